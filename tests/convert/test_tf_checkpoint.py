"""Checkpoints of every generation become the right variables, or one clear line."""

import io
import tarfile

import jax
import numpy as np
import pytest

from effv2_jax import UserError
from effv2_jax.convert import generations, tf_checkpoint
from effv2_jax.convert.bundle_writer import write_bundle
from effv2_jax.convert.checkpoint_files import find
from effv2_jax.convert.conversion import Conversion
from effv2_jax.convert.generations import GRAPH_KEY
from effv2_jax.convert.mapping import from_variables
from effv2_jax.convert.names_tf import tensor_names
from effv2_jax.convert.tensor_bundle import Bundle
from effv2_jax.models.network import create_model
from tests import reference
from tests.convert import checkpoints

# name -> weights taken by "auto", what is left out
GENERATIONS = {
    "full": ("ema", {"raw variables": 94, "optimizer slots": 124, "step counters": 1}),
    "full_head_1": ("ema", {"raw variables": 94, "step counters": 1}),
    "ema_only": ("ema", {}),
    "raw_noprefix": ("raw", {}),
    "object": ("raw", {"object graph": 1}),
    "tiny.tgz": ("ema", {"raw variables": 94, "step counters": 1}),
}


def convert(name, **options) -> Conversion:
    return tf_checkpoint.convert(checkpoints.FOLDER / name, model=checkpoints.network(), **options)


def official(conversion: Conversion) -> dict[str, np.ndarray]:
    names = tensor_names(conversion.model.block_specs, num_classes=conversion.model.num_classes)
    return from_variables(conversion.variables, names)


def message_of(path, model, **options) -> str:
    with pytest.raises(UserError) as caught:
        tf_checkpoint.convert(path, model=model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", checkpoints.WHOLE)
def test_every_generation_gives_the_values_and_the_account(name):
    conversion = convert(name)
    weights, left_out = GENERATIONS[name]
    found, expected = official(conversion), checkpoints.expected(weights)
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert conversion.left_out == left_out
    assert conversion.num_read == len(found) + sum(left_out.values())
    assert conversion.model.num_classes == 10
    source = conversion.info["source"]
    assert (source["framework"], source["file"], source["weights"]) == ("tensorflow", name, weights)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_logits_are_those_of_tensorflow(weights):
    conversion = convert("full", ema=weights)
    stored = reference.load_npz("checkpoints/logits.npz")[weights]
    apply = jax.jit(conversion.model.apply)
    logits = apply(conversion.variables, reference.image(32, 32, 8, 700))
    assert reference.logits_deviation(logits, stored) < 1e-5  # rounding: 1e-6


@pytest.mark.parametrize("name", checkpoints.WHOLE)
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_weights_that_are_asked_for_are_taken_or_refused(name, weights):
    there = {"ema_only": {"ema"}, "raw_noprefix": {"raw"}, "object": {"raw"}}
    if weights in there.get(name, {"raw", "ema"}):
        conversion = convert(name, ema=weights)
        assert conversion.info["source"]["weights"] == weights
        bias = conversion.variables["params"]["classifier"]["bias"]
        np.testing.assert_array_equal(bias, checkpoints.expected(weights)["head/dense/bias"])
    else:
        with pytest.raises(UserError, match=r"only (raw variables|moving averages) in it"):
            convert(name, ema=weights)


def test_damaged_checkpoints_are_told():
    with pytest.raises(UserError, match=r"cut off: .* has 68,964 bytes of 137,928"):
        convert("damaged_truncated")
    with pytest.raises(UserError, match="wrong checksum of efficientnetv2-b0/blocks_3/tpu_batch"):
        convert("damaged_flipped")


def test_unknown_ema_is_told():
    with pytest.raises(UserError, match="expected one of auto, raw, ema"):
        convert("full", ema="yes")


def test_num_classes_that_disagree_are_told():
    with pytest.raises(UserError, match="has 10 classes, expected 7: leave --num-classes out"):
        convert("full", num_classes=7)
    assert convert("full", num_classes=10).model.num_classes == 10


def test_another_network_that_nobody_knows_is_described():
    message = message_of(checkpoints.FOLDER / "object", "efficientnetv2-s")
    assert "not the weights of efficientnetv2-s, nor of any network known here" in message
    assert "6 blocks, a stem of 8 channels and a head of 32" in message


def gammas(name: str) -> dict[str, np.ndarray]:
    """The norms' scales of a network, which tell what network it is, as a checkpoint."""
    rows = reference.model_facts(name)["variables"]
    shapes = {key: shape for key, shape, _ in rows if key.endswith("gamma")}
    return {f"any name/{key}": np.ones(shape, np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", reference.load_json("models.json"))
def test_another_network_of_the_table_is_named(tmp_path, name):
    write_bundle(tmp_path / "model", gammas(name))
    asked = "efficientnetv2-b0" if name != "efficientnetv2-b0" else "efficientnetv2-b1"
    message = message_of(tmp_path, asked)
    assert f"not the weights of {asked} but of {name}: use --model {name}" in message


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    bundle = Bundle(find(checkpoints.FOLDER / "full"))
    found = bundle.read(bundle.entries)
    return {key: value for key, value in found.items() if value.dtype == np.float32}


def test_everything_wrong_with_the_tensors_is_told_at_once(tmp_path, tensors):
    tensors = {k: v for k, v in tensors.items() if k.endswith("ExponentialMovingAverage")}
    average = "efficientnetv2-b0/{}/ExponentialMovingAverage".format
    del tensors[average("blocks_3/se/conv2d/bias")]
    tensors[average("head/conv2d/kernel")] = np.zeros((1, 1, 24, 33), np.float32)
    tensors[average("stem/conv2d/extra")] = np.zeros(3, np.float32)
    tensors["something/else"] = np.zeros(3, np.float32)
    beta = tensors[average("stem/tpu_batch_normalization/beta")].copy()
    beta[1] = np.inf
    tensors[average("stem/tpu_batch_normalization/beta")] = beta
    write_bundle(tmp_path / "model", tensors)
    message = message_of(tmp_path, checkpoints.network())
    for part in (
        f"{tmp_path / 'model'}: not the weights of efficientnetv2-b0",
        "1 missing: blocks_3/se/conv2d/bias",
        "2 unexpected: stem/conv2d/extra, something/else",
        "head/conv2d/kernel is float32[1, 1, 24, 33], expected float32[1, 1, 24, 32]",
        "1 not finite: stem/tpu_batch_normalization/beta (1 of 8 values)",
    ):
        assert part in message


def test_a_shadow_that_is_missing_is_not_replaced_by_the_raw_variable(tmp_path, tensors):
    """`auto` takes one kind of weights, never a mixture."""
    left = dict(tensors)
    del left["efficientnetv2-b0/head/dense/kernel/ExponentialMovingAverage"]
    write_bundle(tmp_path / "model", left)
    assert "1 missing: head/dense/kernel" in message_of(tmp_path, checkpoints.network())
    conversion = tf_checkpoint.convert(tmp_path, model=checkpoints.network(), ema="raw")
    assert conversion.left_out["moving averages"] == 93


def test_other_checkpoints_are_told(tmp_path):
    write_bundle(tmp_path / "model", {"resnet50/conv1/kernel": np.zeros(3, np.float32)})
    message = message_of(tmp_path, "efficientnetv2-b0")
    assert "no variables of an EfficientNet in it" in message
    assert "found resnet50/conv1/kernel" in message


def test_an_object_that_is_no_network_is_told():
    with pytest.raises(UserError, match="an object-based checkpoint without an official network"):
        generations.by_object(["a", GRAPH_KEY], b"\x0a\x00", where="here")


@pytest.mark.parametrize(
    "graph", [b"\x0a\x06\x0a\x04\x08\x63\x12\x00", b"\x0a\xff", b"\x08\x01\x0a\x80"]
)
def test_damaged_object_graphs_are_told(graph):
    with pytest.raises(UserError, match="damaged: the graph of its objects"):
        generations.by_object([], graph, where="here")


def test_training_state_around_a_keras_object_is_left_out():
    """Written by `tf.train.Checkpoint(model=..., optimizer=...)`: the network is not the root."""
    bundle = Bundle(find(checkpoints.FOLDER / "object_training"))
    contents = generations.by_object(bundle.entries, bundle.read_string(GRAPH_KEY), where="here")
    assert contents.left_out == {"object graph": 1, "optimizer slots": 22, "training state": 6}
    assert not contents.unknown
    assert len(contents.raw) == 17
    assert contents.raw["blocks_0/conv2d/kernel"].startswith("model/_blocks/0/_project_conv/kernel")


@pytest.mark.parametrize("slot", ["RMSProp", "RMSProp_1", "Momentum", "Adam", "Adam_1"])
@pytest.mark.parametrize("start", ["", "efficientnetv2-b0/", "model/efficientnet-b0_1/"])
def test_slots_of_optimizers_are_left_out_where_their_variable_is_there(start, slot):
    keys = [f"{start}stem/conv2d/kernel", f"{start}stem/conv2d/kernel/{slot}",
            f"{start}head/other/{slot}", "global_step", "beta1_power", "beta2_power"]  # fmt: skip
    contents = generations.by_name(keys, where="here")
    assert contents.raw == {"stem/conv2d/kernel": f"{start}stem/conv2d/kernel"}
    assert contents.left_out == {"step counters": 3, "optimizer slots": 1}
    assert contents.unknown == (f"{start}head/other/{slot}",)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("b0/head_1/dense/kernel", "head/dense/kernel"),
        ("b0/head/dense_1/bias", "head/dense/bias"),
        ("b0/stem_1/conv2d/kernel", "stem/conv2d/kernel"),
        ("b0/blocks_12/se/conv2d_1/bias", "blocks_12/se/conv2d_1/bias"),
        ("a/b/c/blocks_0/conv2d/kernel", "blocks_0/conv2d/kernel"),
    ],
)
def test_numbered_scopes_and_any_prefix_are_recognised(key, name):
    assert generations.by_name([key], where="here").raw == {name: key}
    average = f"{key}/ExponentialMovingAverage"
    assert generations.by_name([average], where="here").average == {name: average}


def test_two_networks_and_two_tensors_for_one_variable_are_told():
    with pytest.raises(UserError, match="2 networks in one checkpoint: a/stem/x, b/stem/x"):
        generations.by_name(["a/stem/x", "b/stem/x"], where="here")
    with pytest.raises(UserError, match="two tensors for one variable: a/head/x and a/head_1/x"):
        generations.by_name(["a/head/x", "a/head_1/x"], where="here")


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_released_archive_of_b0_gives_every_value(tmp_path, weights):
    name = "efficientnetv2-b0"
    values = checkpoints.write_released(name, tmp_path / "model", weights=weights)
    with tarfile.open(tmp_path / f"{name}.tgz", "w:gz", compresslevel=1) as tar:
        for path in sorted(tmp_path.glob("model.*")):
            tar.add(path, f"{name}/{path.name}")
        tar.addfile(tarfile.TarInfo(f"{name}/checkpoint"), io.BytesIO())
    conversion = tf_checkpoint.convert(tmp_path / f"{name}.tgz", model=name, ema=weights)
    found = official(conversion)
    assert set(found) == set(values)
    for key, value in values.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert conversion.info["preprocessing"]["kind"] == "v1"
    assert conversion.info["image_size"] == 224


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("name", reference.load_json("models.json"))  # L2: 8 GB of memory
def test_released_networks_have_the_official_logits(tmp_path, name, weights):
    checkpoints.write_released(name, tmp_path / "model", weights=weights)
    conversion = tf_checkpoint.convert(tmp_path / "model", model=name, ema=weights)
    logits = jax.jit(conversion.model.apply)(
        conversion.variables, reference.model_input(name, "square")
    )
    stored = reference.model_logits(name)["square_logits"]
    assert reference.logits_deviation(logits, stored) < 1e-4  # tests/models/test_parity.py


def test_a_network_without_classifier_is_converted(tmp_path, tensors):
    left = {key: value for key, value in tensors.items() if "/dense/" not in key}
    write_bundle(tmp_path / "model", left)
    conversion = tf_checkpoint.convert(tmp_path, model=checkpoints.network())
    assert conversion.model == create_model(
        "efficientnetv2-b0", 0, blocks=conversion.model.blocks, feature_size=32
    )
