"""Starting from trained weights: everything is used or named."""

import numpy as np
import pytest
from flax import traverse_util

from effv2_jax.config import base_config
from effv2_jax.config_files import apply_overrides
from effv2_jax.convert.weights_file import save_weights
from effv2_jax.data.kinds import describe
from effv2_jax.errors import UserError
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model
from effv2_jax.training import setup
from effv2_jax.training.transfer import transfer


def _flat(variables):
    return {
        name: np.asarray(value)
        for name, value in traverse_util.flatten_dict(variables, sep="/").items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A weights file of ten classes, and what is in it."""
    path = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    model = create_model("testing", 10)
    variables = init_variables(model, 7, 32)
    save_weights(path, model, variables, {"preprocessing": describe("v2", 32)})
    return path, _flat(variables)


def test_same_network_takes_every_tensor(trained):
    path, expected = trained
    model = create_model("testing", 10)
    found, told = transfer(init_variables(model, 0, 32), model, spec=str(path), preprocessing="v2")
    found = _flat(found)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert told == f"init: {len(expected)} tensors of {path}"


def test_other_number_of_classes_keeps_a_fresh_classifier(trained):
    path, expected = trained
    model = create_model("testing", 3)
    fresh = init_variables(model, 0, 32)
    found, told = transfer(fresh, model, spec=str(path), preprocessing="v2")
    found, fresh = _flat(found), _flat(fresh)
    for name in found:
        source = fresh if name.startswith("params/classifier/") else expected
        np.testing.assert_array_equal(found[name], source[name], err_msg=name)
    assert "the classifier is new (3 classes instead of 10)" in told


def test_weights_of_another_network_are_refused_by_name(trained):
    path, _ = trained
    model = create_model("testing", 10, width=2.0)
    with pytest.raises(UserError) as error:
        transfer(init_variables(model, 0, 32), model, spec=str(path), preprocessing="v2")
    message = str(error.value)
    assert "of another shape" in message
    assert "params/blocks_0/" in message
    assert message.endswith("more of another shape; set --config.model.width=1.0")
    assert "\n" not in message


def test_other_blocks_are_named_as_the_flag_that_gives_them(trained):
    path, _ = trained
    rows = ("r1_k3_s1_e1_i8_o8_c1", "r1_k3_s2_e2_i8_o16_se0.25")
    model = create_model("testing", 10, blocks=rows)
    with pytest.raises(UserError, match=r"; set --config\.model\.blocks=(\S+)$") as error:
        transfer(init_variables(model, 0, 32), model, spec=str(path), preprocessing="v2")
    config = base_config()
    apply_overrides(config, {"model.blocks": str(error.value).rpartition("=")[2]})
    assert create_model("testing", 10, blocks=config.model.blocks) == create_model("testing", 10)


def test_weights_of_another_activation_padding_and_epsilon_are_refused_with_the_flags(trained):
    path, _ = trained
    model = create_model("testing", 10, activation="relu", padding="SYMMETRIC", bn_epsilon=1e-5)
    with pytest.raises(UserError) as error:
        transfer(init_variables(model, 0, 32), model, spec=str(path), preprocessing="v2")
    for text in (
        "--config.model.activation=silu (the config has relu)",
        "--config.model.padding=SAME (the config has SYMMETRIC)",
        "--config.model.bn_epsilon=0.001 (the config has 1e-05)",
    ):
        assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_one_activation_under_two_names_is_the_same(trained):
    path, _ = trained
    model = create_model("testing", 10, activation="swish")
    transfer(init_variables(model, 0, 32), model, spec=str(path), preprocessing="v2")


@pytest.mark.parametrize(
    ("made_with", "kind", "flag"),
    [("v1", "finetune", "v1"), ("v2", "v1", "v2"), ("advprop", "v1", "advprop")],
)
def test_images_normalised_otherwise_are_refused_with_the_flag(tmp_path, made_with, kind, flag):
    path = tmp_path / "x.safetensors"
    model = create_model("testing", 10)
    fresh = init_variables(model, 0, 32)
    save_weights(path, model, fresh, {"preprocessing": describe(made_with, 224)})
    with pytest.raises(UserError) as error:
        transfer(fresh, model, spec=str(path), preprocessing=kind)
    assert f"set --config.data.preprocessing={flag}" in str(error.value)
    assert "\n" not in str(error.value)


def test_images_cropped_otherwise_are_told(trained):
    path, _ = trained  # v2: the official fine-tuning of V2 weights is `finetune`
    model = create_model("testing", 10)
    _, told = transfer(
        init_variables(model, 0, 32), model, spec=str(path), preprocessing="finetune"
    )
    assert told.endswith("; their images were made as 'v2', the run's are 'finetune'")


def test_weights_that_do_not_know_their_images_say_so(tmp_path):
    path = tmp_path / "x.safetensors"
    model = create_model("testing", 10)
    fresh = init_variables(model, 0, 32)
    save_weights(path, model, fresh)
    _, told = transfer(fresh, model, spec=str(path), preprocessing="v1")
    assert told.endswith("; they do not say how their images were made")


def test_a_file_that_is_no_weights_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    model = create_model("testing", 10)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        transfer(init_variables(model, 0, 32), model, spec=str(path), preprocessing="v2")


def test_a_run_starts_from_the_file_and_so_does_its_average(trained, capsys):
    path, expected = trained
    config = base_config()
    config.model.name, config.data.source = "testing", "digits"
    config.progressive.image_sizes, config.train.batch_size = (16,), 4
    config.data.augment = "none"
    config.init.weights = str(path)
    state = setup.initial_state(setup.prepare(config))
    assert f"tensors of {path}" in capsys.readouterr().out
    for tree in ({"params": state.params, "batch_stats": state.batch_stats}, state.ema):
        for name, value in _flat(tree).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
