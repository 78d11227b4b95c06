"""The config schema, its checks and its JSON form."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effv2_jax import config as config_lib
from effv2_jax.config import base_config, from_json, keys, nearest, to_json, validate
from effv2_jax.config_files import apply_overrides
from effv2_jax.data.kinds import KINDS
from effv2_jax.errors import UserError


def _valid():
    config = base_config()
    config.data.source = "digits"
    return config


def _problems(config) -> str:
    with pytest.raises(UserError) as error:
        validate(config)
    return str(error.value)


def test_defaults_are_valid_but_for_the_folder_nobody_named():
    assert "data.dir" in _problems(base_config())
    validate(_valid())


def test_schema_is_locked():
    config = base_config()
    with pytest.raises(AttributeError):
        config.train.epoch = 5


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.name", "efficientnetv2-t", "nearest: efficientnetv2-"),
        ("model.num_classes", 0, "at least 1"),
        ("model.survival_prob", 0.0, "above 0 to 1"),
        ("model.activation", "sillu", "nearest: silu"),
        ("model.blocks", ("r2_k3_s1_e1_i24",), "expected like r2_k3_s1_e4_i24_o48"),
        ("model.blocks", (3,), "a text in every entry"),
        ("model.bn_group_size", 3000, "not divisible by model.bn_group_size = 3000"),
        ("data.source", "tdfs", "nearest: tfds"),
        ("data.source", "tfds", "data.name"),
        ("data.crop_area", (0.5, 0.1), "0 < low <= high <= 1"),
        ("data.crop_area", (0.5,), "two numbers"),
        ("data.crop_area", ("a", "b"), "a finite number in every entry"),
        ("data.eval_fraction", 1.0, "from 0 to below 1"),
        ("data.train_list", "train.txt", "only one is set"),
        ("train.optimizer", "rmspro", "nearest: rmsprop"),
        ("train.schedule", "exponentail", "nearest: exponential"),
        ("train.batch_size", 0, "at least 1"),
        ("train.epochs", 0.0, "above 0"),
        ("train.epochs", 2.0, "longer than the whole run (train.epochs: 2)"),
        ("train.learning_rate", -0.1, "above 0"),
        ("train.min_learning_rate", 1.0, "is above train.learning_rate"),
        ("train.decoupled_weight_decay", 0.1, "use adamw"),
        ("train.weight_decay_exclude", "(", "not a regular expression"),
        ("train.seed", -1, "from 0 to 2**32 - 1"),
        ("train.ema_decay", 1.0, "from 0 to below 1"),
        ("progressive.preset", "offical", "nearest: official"),
        ("progressive.image_sizes", (128, 0), "every entry at least 1"),
        ("progressive.image_sizes", (128, 160.5), "a whole number in every entry"),
        ("progressive.image_sizes", (128, True), "a whole number in every entry"),
        ("progressive.epochs", ("a",), "a finite number in every entry"),
        ("train.epochs", float("inf"), "a finite number"),
        ("train.learning_rate", float("nan"), "a finite number"),
        ("progressive.dropout_rates", (0.1, 1.0), "every entry from 0 to below 1"),
        ("progressive.batch_sizes", (0,), "every entry at least 1"),
        ("eval.every_epochs", 0.0, "above 0"),
        ("model.padding", "VALID", "expected one of SAME, SYMMETRIC"),
        ("init.weights", "nowhere.safetensors", "no such file"),
        ("init.weights", "efficientnetv2-s:imagenet", "were released: imagenet1k, imagenet21k"),
        ("init.weights", "efficientnetv2-t:imagenet1k", "did you mean 'efficientnetv2-"),
        ("init.weights", "efficientnetv2-b0:imagenet1k", "set model.name=efficientnetv2-b0"),
        ("init.freeze", "[", "not a regular expression"),
        ("runtime.devices", 3, "not divisible by runtime.devices = 3"),
        ("runtime.keep_last", 0, "at least 1"),
    ],
)
def test_impossible_value_is_named_with_what_is_allowed(key, value, says):
    config = _valid()
    section, name = key.split(".")
    config[section][name] = value
    message = _problems(config)
    assert key in message
    assert says in message
    assert "\n" not in message  # one mistake, one line


def test_names_of_released_weights_are_weights():
    config = _valid()
    config.init.weights = f"{config.model.name}:imagenet21k-ft1k"
    validate(config)


def test_all_problems_are_reported_at_once():
    config = _valid()
    config.train.batch_size = 0
    config.train.optimizer = "rmspro"
    config.progressive.image_sizes = (64, 96)
    config.progressive.magnitudes = (1.0, 2.0, 3.0)
    message = _problems(config)
    assert "3 problems" in message
    for part in ("train.batch_size = 0", "'rmspro'", "image_sizes: 2", "magnitudes: 3"):
        assert part in message


def test_stage_lists_must_agree_with_the_number_of_stages():
    config = _valid()
    config.progressive.stages = 4
    config.progressive.epochs = (1.0, 2.0)
    message = _problems(config)
    assert "progressive.epochs: 2" in message
    assert "progressive.stages: 4" in message


def test_settings_without_effect_are_refused():
    config = _valid()
    config.data.augment = "autoaugment"
    config.progressive.magnitudes = (5.0, 10.0)
    assert "progressive.magnitudes has no effect" in _problems(config)
    config = _valid()
    config.eval.raw = False
    config.train.ema_decay = 0.0
    assert "no weights to evaluate" in _problems(config)


def test_batch_sizes_of_stages_must_be_divisible_too():
    config = _valid()
    config.runtime.devices = 8
    config.progressive.batch_sizes = (64, 36)
    assert "progressive.batch_sizes = 36: not divisible by runtime.devices = 8" in _problems(config)


def test_unknown_and_missing_keys_of_an_unlocked_config_are_found():
    config = _valid().unlock()
    config.train.epoch = 3
    config.trian = {}
    del config.eval.batch_size
    message = _problems(config)
    assert "unknown key 'train.epoch' (nearest: train.epochs)" in message
    assert "unknown section 'trian' (nearest: train)" in message
    assert "eval.batch_size is missing" in message


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("train.seed", None, "a whole number"),
        ("train.batch_size", 1.5, "a whole number"),
        ("train.epochs", "ten", "a finite number"),
        ("train.epochs", True, "a finite number"),
        ("model.remat", 1, "True or False"),
        ("train.optimizer", 3, "a text"),
        ("progressive.image_sizes", 128, "a list"),
        ("model.num_classes", "ten", "a whole number or None"),
    ],
)
def test_wrong_type_is_found(key, value, kind):
    config = _valid()
    section, name = key.split(".")
    # Past ml_collections' own check, as a config file that replaces a whole section gets.
    config.unlock()
    config[section] = {**config[section].to_dict(), name: value}
    assert f"{key} = {value!r}: expected {kind}" in _problems(config)


def test_choices_are_those_the_code_has():
    from effv2_jax.data import policy, sources
    from effv2_jax.models import layers
    from effv2_jax.training import optimizers, progressive

    for key, names in {
        "model.activation": layers.ACTIVATIONS,
        "model.padding": layers.PADDINGS,
        "train.optimizer": optimizers.NAMES,
        "progressive.preset": progressive.PRESETS,
        "data.augment": policy.POLICIES,
        "data.source": sources.SOURCES,
    }.items():
        assert set(config_lib.CHOICES[key]) == set(names), key


@pytest.mark.parametrize("kind", [*KINDS, "pillow-bicubic-0.875-imagenet"])
def test_every_kind_of_preprocessing_is_accepted(kind):
    config = _valid()
    config.data.preprocessing = kind
    validate(config)


def test_an_unknown_kind_of_preprocessing_is_found():
    config = _valid()
    config.data.preprocessing = "v3"
    problem = "data.preprocessing = 'v3': expected one of v2, v1, finetune, advprop, or like pillow"
    assert problem in _problems(config)


def test_networks_of_timm_can_be_trained():
    config = _valid()
    config.model.name = "efficientnetv2-rw-t"
    validate(config)


def test_every_key_with_a_number_has_a_range_or_is_free_by_intent():
    free = {"model.head_bias"}
    numbers = {
        key
        for key, value in keys(base_config()).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers - free <= set(config_lib._RANGES)
    assert set(config_lib._RANGES) | set(config_lib.CHOICES) <= set(keys(base_config()))


def test_json_round_trip_keeps_values_and_types():
    config = _valid()
    config.progressive.image_sizes = (64, 96)
    config.model.num_classes = 10
    config.train.epochs = 5
    again = from_json(to_json(config))
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.progressive.image_sizes, tuple)
    assert isinstance(again.train.epochs, float)
    assert again.is_locked


def test_json_names_what_is_wrong():
    with pytest.raises(UserError, match=r"run/config.json is not JSON"):
        from_json("{", source="run/config.json")
    with pytest.raises(UserError, match=r"unknown key 'train.epoch' \(nearest: train.epochs\)"):
        from_json('{"train": {"epoch": 1}}')


def test_config_of_an_older_version_gets_defaults_for_new_keys():
    assert from_json('{"train": {"epochs": 7}}').train.epochs == 7
    assert from_json('{"train": {"epochs": 7}}').train.optimizer == "rmsprop"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.epochs", "5", 5.0),
        ("train.epochs", "1e-2", 0.01),
        ("train.batch_size", "64", 64),
        ("model.remat", "true", True),
        ("model.remat", "False", False),
        ("model.remat", "0", False),
        ("model.num_classes", "10", 10),
        ("model.num_classes", "None", None),
        ("model.width", "none", None),
        ("data.dir", "/a b/c=d", "/a b/c=d"),
        ("data.dir", "", ""),
        ("progressive.image_sizes", "64,96,128", (64, 96, 128)),
        ("progressive.image_sizes", "(64, 96)", (64, 96)),
        ("progressive.image_sizes", "[64]", (64,)),
        ("progressive.image_sizes", "()", ()),
        ("progressive.dropout_rates", "0,0.1", (0, 0.1)),
        (
            "model.blocks",
            "r1_k3_s1_e1_i8_o8_c1,r1_k3_s1_e1_i8_o8_c1",
            ("r1_k3_s1_e1_i8_o8_c1",) * 2,
        ),
    ],
)
def test_override_is_read_as_the_type_of_its_key(key, text, value):
    config = _valid()
    apply_overrides(config, {key: text})
    found = keys(config)[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("train.epoch", "5", "unknown key --config.train.epoch (nearest: train.epochs)"),
        ("epochs", "5", "unknown key --config.epochs (nearest: progressive.epochs, train.epochs)"),
        ("train.batch_size", "4.5", "--config.train.batch_size=4.5: expected a whole number"),
        ("train.batch_size", "none", "expected a whole number"),
        ("model.remat", "maybe", "expected true or false"),
        ("train.epochs", "ten", "expected a number"),
    ],
)
def test_override_that_cannot_be_read_is_named(key, text, says):
    with pytest.raises(UserError) as error:
        apply_overrides(_valid(), {key: text})
    assert says in str(error.value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 2000), max_size=6))
def test_any_list_of_sizes_survives_the_command_line(sizes):
    config = _valid()
    apply_overrides(config, {"progressive.image_sizes": str(tuple(sizes))})
    assert config.progressive.image_sizes == tuple(sizes)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(keys(base_config()))), st.text(max_size=8))
def test_any_override_is_taken_or_refused_in_words(key, text):
    config = _valid()
    said = ""
    try:
        apply_overrides(config, {key: text})
        validate(config)
    except UserError as error:
        said = str(error)
    assert not said or key.split(".")[1] in said


def test_nearest_of_a_part_is_the_words_that_it_is_part_of():
    known = keys(base_config())
    found = " (nearest: progressive.mixup_alpha, progressive.mixup_alphas)"
    assert nearest("train.mixup", known) == found
    assert nearest("train.epoch", known) == " (nearest: train.epochs)"


def test_nearest_says_nothing_when_nothing_is_alike():
    assert nearest("xyzzy", ["train.epochs"]) == ""


def test_label_subset_needs_one_class_per_example():
    config = base_config()
    config.data.dir = "photos"
    config.eval.label_subset = "imagenet1k"
    validate(config)
    config.data.multilabel = True
    with pytest.raises(UserError, match="label_subset needs one class per example"):
        validate(config)
    config.eval.label_subset = "imagenet"
    with pytest.raises(
        UserError, match=r"expected one of none, imagenet1k \(nearest: imagenet1k\)"
    ):
        validate(config)
