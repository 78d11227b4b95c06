"""Grad-CAM: equal to its definition, and hot where the evidence is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.data.kinds import get_kind
from effv2_jax.errors import UserError
from effv2_jax.inference.grad_cam import grad_cam, heat_maps, layers
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model
from tests.inference.networks import network


@pytest.fixture(scope="module")
def trained():
    model, variables = network(5)
    rng = np.random.default_rng(1)
    variables["batch_stats"] = jax.tree.map(
        lambda v: (v + 0.3 * rng.random(v.shape)).astype(np.float32), variables["batch_stats"]
    )
    images = rng.normal(size=(3, 24, 32, 3)).astype(np.float32)
    return model, variables, images, np.asarray([4, 0, 2], np.int32)


def test_at_the_last_maps_it_is_their_sum_weighted_by_the_classifier(trained):
    """Mean and classifier are linear: dy_c / dA_k is W[k, c] / (h w) everywhere."""
    model, variables, images, classes = trained
    _, ends = model.apply(variables, images, endpoints=True)
    maps = np.asarray(ends["head_1x1"], np.float64)
    kernel = np.asarray(variables["params"]["classifier"]["kernel"], np.float64)
    positions = maps.shape[1] * maps.shape[2]
    expected = np.einsum("nhwk,kn->nhw", maps, kernel[:, classes]) / positions
    found = grad_cam(model, variables, images, classes)
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)
    assert np.any(found > 0)


def test_before_the_head_it_is_the_gradient_through_the_head(trained):
    model, variables, images, classes = trained
    _, ends = model.apply(variables, images, endpoints=True)
    params, stats = variables["params"], variables["batch_stats"]["head"]["norm"]

    def logits(features):
        x = jnp.einsum("nhwc,ck->nhwk", features, params["head"]["conv"]["kernel"][0, 0])
        x = (x - stats["mean"]) / jnp.sqrt(stats["var"] + model.bn_epsilon)
        x = x * params["head"]["norm"]["scale"] + params["head"]["norm"]["bias"]
        x = (x * jax.nn.sigmoid(x)).mean((1, 2))
        return (x @ params["classifier"]["kernel"])[jnp.arange(3), classes].sum()

    gradient = jax.grad(logits)(ends["features"])
    weights = gradient.mean((1, 2), keepdims=True)
    expected = jnp.maximum((weights * ends["features"]).sum(-1), 0)
    for layer in ("features", "block_0", "reduction_1"):  # three names of one tensor
        found = grad_cam(model, variables, images, classes, layer=layer)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_layer_has_the_resolution_of_its_endpoint():
    model = create_model("testing", 3, lowering="plain")
    variables = init_variables(model, 0)
    images = np.ones((1, 32, 48, 3), np.float32)
    _, ends = jax.eval_shape(lambda: model.apply(variables, images, endpoints=True))
    named = {name for name, end in ends.items() if len(end.shape) == 4 and "/" not in name}
    assert set(layers(model)) == named
    for name in ("stem", "reduction_1", "features"):
        shape = jax.eval_shape(
            lambda name=name: grad_cam(model, variables, images, np.zeros(1, np.int32), layer=name)
        ).shape
        assert shape == ends[name].shape[:3]


@pytest.mark.parametrize(("row", "column"), [(1, 1), (1, 6), (6, 2), (4, 4)])
def test_it_is_hot_where_a_bright_spot_decides(row, column):
    """Kernels that blur, and a classifier whose first class is brightness."""
    model, variables = network(2)
    params = variables["params"]

    def blur(path, value):
        kernel = getattr(path[-1], "key", "") == "kernel" and value.ndim == 4
        return jnp.ones_like(value) / np.prod(value.shape[:3]) if kernel else value

    params = jax.tree_util.tree_map_with_path(blur, params)
    params["classifier"]["kernel"] = jnp.asarray([[1.0, -1.0]] * model.head_channels)
    images = np.zeros((1, 32, 32, 3), np.float32)
    images[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    found = grad_cam(model, {**variables, "params": params}, images, np.zeros(1, np.int32))
    assert found.shape == (1, 8, 8)
    hottest = np.unravel_index(np.argmax(found[0]), (8, 8))
    # Strides put the centre of a blur up to one cell towards the top left.
    assert max(abs(hottest[0] - row), abs(hottest[1] - column)) <= 1
    against = grad_cam(model, {**variables, "params": params}, images, np.ones(1, np.int32))
    assert float(against.max()) == 0  # brightness speaks against the other class


def test_program_over_devices_computes_the_same(trained):
    model, variables, _, classes = trained
    kind = get_kind("v2")
    program = heat_maps(model, variables, kind=kind, layer="features", batch_size=3)
    images = np.random.default_rng(2).uniform(0, 255, (program.batch_size, 24, 24, 3))
    images = images.astype(np.float32)
    classes = np.resize(classes, program.batch_size)
    found = program(images, classes)
    alone = grad_cam(model, variables, (images - 128) / 128, classes, layer="features")
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)


def test_unknown_layer_is_refused_with_the_nearest(trained):
    model, variables, images, classes = trained
    with pytest.raises(UserError, match=r"none of this name \(nearest: features\); it has stem"):
        grad_cam(model, variables, images, classes, layer="feature")
