import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from effv2_jax.errors import UserError
from effv2_jax.models import layers
from effv2_jax.models.norm import BatchNorm
from tests import reference

OFFICIAL_ACTIVATIONS = sorted(
    name.removeprefix("act/").removesuffix("_grad")
    for name in reference.load_npz("blocks.npz")
    if name.startswith("act/") and name.endswith("_grad")
)


@pytest.mark.parametrize("name", OFFICIAL_ACTIVATIONS)
def test_activation_equals_the_official_one_in_value_and_gradient(name):
    data = reference.load_npz("blocks.npz")
    value, grad = jax.jit(jax.vmap(jax.value_and_grad(layers.get_activation(name))))(data["act/x"])
    # float32; measured 2e-7. The points include all kinks.
    np.testing.assert_allclose(value, data[f"act/{name}"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad, data[f"act/{name}_grad"], rtol=1e-6, atol=1e-6)


def test_no_activation_name_means_silu():
    data = reference.load_npz("blocks.npz")
    value = layers.get_activation("")(data["act/x"])
    np.testing.assert_allclose(value, data["act/default_none"], rtol=1e-6, atol=1e-6)


def test_gelu_is_the_exact_one():
    # x * Phi(x) at 1: 0.841345 is the normal distribution function at 1.
    assert float(layers.get_activation("gelu")(jnp.float32(1))) == pytest.approx(0.841345, abs=1e-6)


def test_unknown_activation_names_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'relu6'"):
        layers.get_activation("relu66")


def _norm(x, *, variables=None, **attributes):
    """Output in training and the moved statistics."""
    norm = BatchNorm(**attributes)
    channels = x.shape[-1]
    variables = variables or {
        "params": {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)},
        "batch_stats": {"mean": jnp.zeros(channels), "var": jnp.ones(channels)},
    }
    y, moved = norm.apply(variables, x, True, mutable=["batch_stats"])
    return y, moved["batch_stats"]


@pytest.mark.parametrize("two_pass", [False, True])
def test_moving_variance_is_the_unbiased_one_of_the_official_fused_norm(two_pass):
    facts = reference.load_json("blocks.json")["_batch_norm_moving_variance"]["results"]
    facts = facts["utils.BatchNormalization"]
    x = reference.image(3, 3, 2, 77, channels=4)
    _, unbiased = _norm(x, two_pass=two_pass)
    _, biased = _norm(x, two_pass=two_pass, unbiased=False)
    np.testing.assert_allclose(unbiased["var"], facts["moving_variance"], rtol=3e-7)
    # The biased one is 1.7e-3 away, so that a test at 3e-7 tells them apart.
    np.testing.assert_allclose(biased["var"], facts["if_biased"], rtol=3e-7)


def test_norm_equals_its_definition_in_training_and_evaluation():
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (4, 3, 5, 6)).astype(np.float32)
    scale, bias, mean = rng.normal(size=(3, 6)).astype(np.float32)
    var = rng.uniform(0.5, 2, 6).astype(np.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    y, moved = _norm(x, variables=variables, momentum=0.7, epsilon=0.1)
    batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - batch_mean) / np.sqrt(batch_var + 0.1) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moved["mean"], 0.7 * mean + 0.3 * batch_mean, rtol=1e-5)
    np.testing.assert_allclose(moved["var"], 0.7 * var + 0.3 * batch_var * 60 / 59, rtol=1e-5)

    evaluated = BatchNorm(epsilon=0.1).apply(variables, x, False)
    expected = (x - mean) / np.sqrt(var + 0.1) * scale + bias
    np.testing.assert_allclose(evaluated, expected, rtol=1e-5, atol=1e-5)


def test_two_passes_stay_exact_where_one_pass_loses_digits():
    x = np.random.default_rng(0).normal(1000, 1, (4, 8, 8, 3)).astype(np.float32)
    true = x.astype(np.float64).var((0, 1, 2))
    errors = {}
    for two_pass in (False, True):
        _, moved = _norm(x, two_pass=two_pass, unbiased=False, momentum=0.0)
        errors[two_pass] = np.max(np.abs(moved["var"] - true))
    assert errors[True] < 1e-5  # float32 about the mean
    assert errors[False] > 100 * errors[True]  # E[x^2] is 1e6 here, its rounding step 0.06


def test_constant_channel_has_variance_zero_and_finite_gradient():
    x = jnp.full((2, 3, 3, 1), 0.1)
    grad = jax.grad(lambda x: jnp.sum(_norm(x)[0] ** 2))(x)
    _, moved = _norm(x, momentum=0.0)
    assert float(moved["var"][0]) >= 0
    assert np.all(np.isfinite(grad))


def test_groups_normalise_consecutive_examples_by_themselves():
    x = np.random.default_rng(0).normal(1, 2, (6, 3, 3, 2)).astype(np.float32)
    y, moved = _norm(x, group_size=2)
    parts = [_norm(x[i : i + 2]) for i in range(0, 6, 2)]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), rtol=1e-5, atol=1e-6)
    for key in ("mean", "var"):
        mean_of_groups = np.mean([stats[key] for _, stats in parts], axis=0)
        np.testing.assert_allclose(moved[key], mean_of_groups, rtol=1e-5, atol=1e-7)


@functools.partial(jax.jit, static_argnames=("devices", "group_size", "two_pass", "unbiased"))
def _sharded_norm(x, cotangent, devices, group_size=0, two_pass=False, unbiased=True):
    """Output, input gradient and moved statistics over a mesh of the given size."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

    def run(x, cotangent):
        norm = functools.partial(
            _norm, axis_name="data", group_size=group_size, two_pass=two_pass, unbiased=unbiased
        )
        y, vjp, moved = jax.vjp(norm, x, has_aux=True)
        return y, vjp(cotangent)[0], moved

    data = P("data")
    return jax.shard_map(
        run, mesh=mesh, in_specs=(data, data), out_specs=(data, data, P()), check_vma=False
    )(x, cotangent)


@pytest.mark.parametrize(
    ("group_size", "unbiased", "two_pass"),
    [
        *((size, True, False) for size in (0, 1, 2, 4, 8)),
        *((size, False, True) for size in (0, 2, 4)),
    ],
)
def test_statistics_do_not_depend_on_the_number_of_devices(group_size, unbiased, two_pass):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(0.5, 2, (2, 8, 3, 5, 4)).astype(np.float32)
    runs = [
        _sharded_norm(x, cotangent, devices, group_size, two_pass, unbiased) for devices in (1, 4)
    ]
    for one, four in zip(*map(jax.tree.leaves, runs), strict=True):
        # The order of the sums differs.
        np.testing.assert_allclose(four, one, rtol=1e-5, atol=1e-6)


def test_group_of_the_whole_batch_is_the_global_norm():
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(0.5, 2, (2, 8, 3, 5, 4)).astype(np.float32)
    for one, four in zip(
        jax.tree.leaves(_sharded_norm(x, cotangent, 4, 8)),
        jax.tree.leaves(_sharded_norm(x, cotangent, 4, 0)),
        strict=True,
    ):
        np.testing.assert_allclose(four, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("group_size", "devices"), [(3, 1), (16, 1), (6, 4), (16, 4)])
def test_group_size_that_does_not_divide_the_batch_is_refused(group_size, devices):
    x = jnp.zeros((8, 3, 5, 4))
    with pytest.raises(UserError, match=f"bn_group_size is {group_size}"):
        _sharded_norm(x, x, devices, group_size)


def test_symmetric_padding_pads_both_sides():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.ones((3, 3, 1, 1))
    results = {}
    for padding in ("SAME", "SYMMETRIC"):
        for cls, extra in ((layers.Conv, {"features": 1}), (layers.DepthwiseConv, {})):
            conv = cls(kernel_size=3, stride=2, padding=padding, **extra)
            y = conv.apply({"params": {"kernel": kernel}}, x)
            results[padding, cls] = np.asarray(y[0, :, :, 0])
    # SAME: windows start at pixel 0; symmetric: at pixel -1, so that the first has 2 x 2 pixels.
    for cls in (layers.Conv, layers.DepthwiseConv):
        np.testing.assert_array_equal(results["SAME", cls], [[45, 39], [66, 50]])
        np.testing.assert_array_equal(results["SYMMETRIC", cls], [[10, 24], [51, 90]])


def test_drop_path_equals_the_official_drop_connect():
    facts = reference.load_json("blocks.json")["_drop_connect"]
    noise = jax.random.uniform(jax.random.key(0), (4096,))
    y = layers.drop_path(jnp.ones((4096, 1, 1, 1)), 0.8, noise)
    np.testing.assert_allclose(np.unique(y), facts["values_seen_at_p_0_8"])
    kept = float(np.mean(y > 0))
    assert abs(kept - 0.8) < 0.025  # 4 standard deviations of 4096 draws
    np.testing.assert_array_equal(y[:, 0, 0, 0] > 0, noise >= np.float32(1) - np.float32(0.8))


def test_drop_path_rounds_in_the_type_of_its_input():
    # 0.8 is 0.80078125 in bfloat16: noise of 0.19921875 survives there, not in float32.
    noise = jnp.full(1, 0.19921875)
    one = jnp.ones((1, 1, 1, 1))
    assert float(layers.drop_path(one, 0.8, noise)[0, 0, 0, 0]) == 0
    kept = layers.drop_path(one.astype(jnp.bfloat16), 0.8, noise)
    assert kept.dtype == jnp.bfloat16
    assert float(kept[0, 0, 0, 0]) == 1.25


def test_dropout_keeps_the_mean_and_zeroes_the_rate():
    noise = jax.random.uniform(jax.random.key(0), (100, 100))
    y = layers.dropout(jnp.ones((100, 100)), 0.3, noise)
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    assert abs(float(np.mean(y == 0)) - 0.3) < 0.02  # 4 standard deviations of 10,000 draws


def test_noise_of_an_example_depends_on_its_global_position_only():
    key = jax.random.key(7)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def draw(count, axis_name):
        return jax.vmap(jax.random.uniform)(layers.example_keys(key, count, axis_name=axis_name))

    sharded = jax.shard_map(
        lambda: draw(2, "data"), mesh=mesh, in_specs=(), out_specs=P("data"), check_vma=False
    )()
    whole = draw(8, None)
    np.testing.assert_array_equal(sharded, whole)
    np.testing.assert_array_equal(draw(5, None), whole[:5])
    assert len(np.unique(whole)) == 8


def test_initial_kernels_have_the_official_deviation():
    key = jax.random.key(0)
    x = jnp.zeros((1, 8, 8, 64))
    conv = layers.Conv(128, kernel_size=3).init(key, x)["params"]["kernel"]
    depthwise = layers.DepthwiseConv(kernel_size=5).init(key, jnp.zeros((1, 8, 8, 512)))
    dense = layers.Classifier(100, bias=-4.5).init(key, jnp.zeros((1, 640)))["params"]
    # 4 standard deviations of the estimate, 1 / sqrt(2 n), with n = 73,728, 12,800 and 64,000.
    assert np.std(conv) == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.011)
    assert np.std(depthwise["params"]["kernel"]) == pytest.approx(np.sqrt(2 / 25), rel=0.025)
    assert np.max(np.abs(dense["kernel"])) <= 0.1
    assert np.std(dense["kernel"]) == pytest.approx(0.1 / np.sqrt(3), rel=0.011)
    np.testing.assert_array_equal(dense["bias"], np.full(100, -4.5))


class OneNorm(nn.Module):
    freeze: str

    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(name="norm", freeze=self.freeze)(x, train)


def _apply_in_training(freeze):
    x = jnp.asarray(np.random.default_rng(0).normal(1, 3, (4, 5, 5, 3)), jnp.float32)
    network = OneNorm(freeze)
    variables = jax.tree.map(lambda leaf: leaf + 0.5, network.init(jax.random.key(0), x, False))
    found, mutated = network.apply(variables, x, True, mutable=["batch_stats"])
    evaluated = network.apply(variables, x, False)
    return found, evaluated, mutated["batch_stats"]["norm"], variables["batch_stats"]["norm"]


def test_a_frozen_norm_trains_as_it_evaluates_and_keeps_its_statistics():
    found, evaluated, after, before = _apply_in_training("norm/")
    np.testing.assert_array_equal(found, evaluated)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize("freeze", ["", "other/", "norm/scale"])
def test_a_norm_that_is_not_frozen_as_a_whole_uses_the_batch(freeze):
    found, evaluated, after, before = _apply_in_training(freeze)
    assert not np.allclose(found, evaluated)
    assert not np.any(after["mean"] == before["mean"])
