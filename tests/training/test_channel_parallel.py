"""Late blocks divided over the devices by channels: the same numbers, and what it saves."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.models import lowering
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model
from effv2_jax.training import channel_parallel, loop, setup
from effv2_jax.training import step as steps
from effv2_jax.training.mesh import AXIS, batch_sharding, make_mesh, put_replicated
from tests.training import tiny
from tests.training.test_step import (
    BATCH,
    CLASSES,
    EVERYTHING,
    SIZE,
    assert_trees_close,
    compiled,
    make_batch,
    make_recipe,
    stages,
)

# The last row alone is wide (see below); its first block has stride 2 and no shortcut.
BLOCKS = (
    "r1_k3_s2_e1_i8_o8_c1",
    "r1_k3_s1_e4_i8_o8_se0.25",
    "r2_k3_s2_e6_i8_o16_se0.25",
)
RECIPE = make_recipe(
    images=EVERYTHING,
    optimizer="rmsprop",
    ema_decay=0.9,
    weight_decay=1e-2,
    label_smoothing=0.1,
    gradient_clip=1.0,
)


@pytest.fixture(autouse=True)
def small_blocks_are_wide(monkeypatch):
    # The last row has 48 and 96 inner channels, and maps of 8 x 6 x 6 pixels.
    row = dataclasses.replace(lowering.TABLE["cpu"], channel_parallel_pixels=6)
    monkeypatch.setitem(lowering.TABLE, "cpu", row)


def network(**overrides):
    """By default with drop path and dropout."""
    overrides = {"survival_prob": 0.5, "dropout_rate": 0.3, "blocks": BLOCKS, **overrides}
    return create_model("testing", CLASSES, feature_size=8, lowering="cpu", **overrides)


def divided_blocks(model):
    return model.channel_parallel_blocks((BATCH, SIZE, SIZE, 3))


def start(model, recipe, mesh):
    state = steps.create_state(recipe, init_variables(model, 0, SIZE))
    return jax.device_put(state, channel_parallel.shardings(state, divided_blocks(model), mesh))


def train(model, mesh, *, recipe=RECIPE, count=3):
    """Returns the state and the metrics of every step."""
    program = compiled(steps.make_train_step(model, recipe, mesh=mesh))
    state, metrics = start(model, recipe, mesh), []
    for step in range(count):
        knobs = put_replicated(steps.stage_knobs(stages()[step], recipe, seed=3), mesh)
        batch = jax.device_put(make_batch(step), batch_sharding(mesh))
        state, found = program(state, batch, knobs)
        metrics.append(jax.device_get(found))
    return state, metrics


def assert_same(found, expected, *, tolerance=3e-5):
    (state, metrics), (expected_state, expected_metrics) = found, expected
    for one, other in zip(metrics, expected_metrics, strict=True):
        assert_trees_close(one, other, tolerance=tolerance)
    assert_trees_close(jax.device_get(state), jax.device_get(expected_state), tolerance=tolerance)


@functools.cache
def trained_on_one_device():
    mesh = make_mesh(1)
    return train(channel_parallel.for_mesh(network(), mesh), mesh)


@pytest.mark.parametrize("devices", [2, 4])
def test_steps_are_those_of_one_device(devices):
    # Dropout, drop path, augmentation, mixing, average, weight decay and clipping are on.
    mesh = make_mesh(devices)
    model = channel_parallel.for_mesh(network(), mesh)
    assert divided_blocks(model) == range(2, 4)
    # The sums have another order: float32, measured 7e-6.
    assert_same(train(model, mesh), trained_on_one_device())


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ({"remat": True}, {}),
        ({"remat_norms": True}, {}),
        ({"bn_two_pass": True}, {"optimizer": "sgd", "decoupled_weight_decay": 0.1}),
        ({}, {"freeze": "blocks_[02]/.*"}),
        ({"blocks": (*BLOCKS[:2], "r2_k3_s1_e6_i8_o8")}, {}),  # no squeeze-and-excite
    ],
)
def test_variants_of_a_step_are_those_of_one_device(overrides, changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    found = []
    for devices in (2, 1):
        mesh = make_mesh(devices)
        model = channel_parallel.for_mesh(network(**overrides), mesh)
        assert bool(divided_blocks(model)) == (devices > 1)
        found.append(train(model, mesh, recipe=recipe, count=2))
    assert_same(*found)


def test_every_device_holds_what_its_network_has():
    # The paths that are divided, against the shapes that the modules of a device ask for.
    model = channel_parallel.for_mesh(network(), make_mesh(4))
    images = jax.ShapeDtypeStruct((BATCH // 4, SIZE, SIZE, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    initial = functools.partial(jax.eval_shape, functools.partial(model.init, train=True), keys)
    part = jax.eval_shape(functools.partial(steps.create_state, RECIPE), initial(images))
    whole = start(model, RECIPE, make_mesh(4))
    found = jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), whole)
    assert found == jax.tree.map(lambda leaf: leaf.shape, part)
    kernel = "blocks_3", "se", "reduce", "kernel"
    for tree in (whole.params, whole.opt_state.momentum, whole.ema["params"]):
        kernel_array = functools.reduce(lambda node, name: node[name], kernel, tree)
        assert kernel_array.addressable_data(3).shape == (1, 1, 24, 4)
    assert whole.params["blocks_1"]["expand_conv"]["kernel"].is_fully_replicated


def test_a_step_leaves_the_state_where_it_was():
    mesh = make_mesh(2)
    model = channel_parallel.for_mesh(network(), mesh)
    before = start(model, RECIPE, mesh)
    after, _ = train(model, mesh, count=1)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_norms_and_gradients_of_divided_channels_do_not_meet():
    def summed(model, mesh):
        """The number of arrays summed over the devices, and their elements."""
        knobs = steps.stage_knobs(stages()[0], RECIPE, seed=3)
        step = jax.jit(steps.make_train_step(model, RECIPE, mesh=mesh))
        text = step.lower(start(model, RECIPE, mesh), make_batch(), knobs).compile().as_text()
        results = re.findall(r"= (.*) all-reduce\(", text)
        shapes = [each for result in results for each in re.findall(r"[fs]32\[([\d,]*)\]", result)]
        return len(shapes), sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)

    mesh = make_mesh(2)
    blocks = (*BLOCKS[:2], "r2_k3_s1_e48_i8_o8_se0.25")
    model = channel_parallel.for_mesh(network(blocks=blocks), mesh)
    shapes = jax.eval_shape(lambda: init_variables(model, 0))["params"]
    divided = channel_parallel.is_divided(shapes, divided_blocks(model))
    own = sum(
        leaf.size
        for leaf, part in zip(jax.tree.leaves(shapes), jax.tree.leaves(divided), strict=True)
        if part
    )
    arrays, elements = summed(model, mesh)
    arrays_by_images, elements_by_images = summed(model.clone(channel_parallel=1), mesh)
    assert arrays < arrays_by_images  # six for a block's norms, four for its projection and gate
    maps = 2 * 2 * math.prod((BATCH, 6, 6, 8))  # of both projections and their gradients
    assert elements < elements_by_images - own + 1.1 * maps


def test_which_blocks_of_which_networks_and_devices_are_divided(monkeypatch):
    monkeypatch.undo()  # the measured limit

    def blocks(name="efficientnetv2-b0", size=192, batch=8, devices=2, **overrides):
        overrides = {"lowering": "cpu", **overrides}
        model = channel_parallel.for_mesh(create_model(name, **overrides), make_mesh(devices))
        assert model.axis_name == AXIS
        return model.channel_parallel_blocks((batch, size, size, 3))

    assert blocks() == range(8, 21)  # 2 x 576 channels, 8 x 12 x 12 pixels
    assert blocks(batch=16) == range(13, 21)  # 2 x 672, 16 x 6 x 6
    assert blocks(size=300, batch=32) == range(21, 21)
    assert blocks("efficientnetv2-s", devices=4) == range(16, 40)
    assert not blocks(devices=1)
    assert not blocks(lowering="gpu")
    assert not blocks(lowering="plain")
    assert not blocks(bn_group_size=4)
    rows = ("r1_k3_s2_e1_i8_o8_c1", "r1_k3_s1_e6_i8_o56")
    assert blocks(size=8, blocks=(*rows, "r2_k3_s1_e6_i56_o56")) == range(1, 4)
    assert not blocks(size=8, blocks=(*rows, "r2_k3_s1_e5_i56_o56"), devices=3)  # 280 inner ones
    assert not blocks(size=8, blocks=(*rows, "r2_k3_s1_e6_i56_o56_c1"))  # fused


def test_inference_takes_whole_variables():
    mesh = make_mesh(2)
    model = channel_parallel.for_mesh(network(), mesh)
    variables = init_variables(model, 0, SIZE)
    images = jnp.asarray(make_batch()["image"], jnp.float32)
    np.testing.assert_array_equal(
        model.apply(variables, images), network().apply(variables, images)
    )
    with pytest.raises(ValueError, match="endpoints=True with channel_parallel > 1"):
        model.apply(variables, images, train=True, endpoints=True)


def test_value_that_is_not_finite_is_found_on_any_device():
    mesh = make_mesh(2)
    model = channel_parallel.for_mesh(network(), mesh)
    state = start(model, RECIPE, mesh)
    assert setup.nonfinite_leaf(state) is None
    block = state.params["blocks_3"]["depthwise_norm"]
    block["scale"] = block["scale"].at[-1].set(jnp.nan)
    assert setup.nonfinite_leaf(state) == "params/blocks_3/depthwise_norm/scale"


def test_run_on_two_devices_continues_on_one_as_if_it_had_been_there_all_the_time(
    tmp_path, monkeypatch
):
    monkeypatch.undo()  # the measured limit
    # Whole arrays in checkpoints, evaluation and final weights.
    changes = {
        "model.lowering": "cpu",
        "model.blocks": ("r1_k3_s2_e1_i8_o8_c1", "r2_k3_s2_e6_i8_o16_se0.25"),
        "train.optimizer": "sgd",
        "train.learning_rate": 0.01,
    }
    two = tiny.tiny_config(**changes, **{"runtime.devices": 2, "runtime.keep_last": 100})
    one = tiny.tiny_config(**changes)
    parts = setup.prepare(two)
    kept = [len(parts.mesh_model.channel_parallel_blocks((16, n, n, 3))) for n in (16, 24)]
    assert kept == [2, 1]  # so that variables move between the stages
    results = loop.train(two, tmp_path / "two")
    expected = loop.train(one, tmp_path / "one")
    assert results == pytest.approx(expected, rel=1e-3)
    found, wanted = (tiny.final_weights(tmp_path / name) for name in ("two", "one"))
    assert_trees_close(found, wanted, tolerance=1e-3)

    # The checkpoints after step 9 are dropped, and the run goes on with one device.
    for folder in (tmp_path / "two" / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > 9:
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
    (tmp_path / "two" / "final.safetensors").unlink()
    changed = tiny.tiny_config(**changes, **{"runtime.keep_last": 100})
    assert loop.train(changed, tmp_path / "two") == pytest.approx(expected, rel=1e-3)
    assert_trees_close(tiny.final_weights(tmp_path / "two"), wanted, tolerance=1e-3)
