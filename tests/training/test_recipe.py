"""What a config means for training: scaled rates, masks, image options."""

import re

import jax
import numpy as np
import pytest

from effv2_jax.config import base_config
from effv2_jax.convert import names_tf
from effv2_jax.errors import UserError
from effv2_jax.models.network import create_model
from effv2_jax.models.variants import get_variant, list_models
from effv2_jax.training import recipe as recipes
from effv2_jax.training.progressive import make_stages
from tests import reference

OFFICIAL_EXCLUDE = ".*(bias|gamma|beta).*"  # hparams.py: weight_decay_exclude


def read(config, num_examples: int = 100_000, num_classes: int = 10) -> recipes.Recipe:
    stages = make_stages(config, variant=get_variant(config.model.name), num_examples=num_examples)
    return recipes.make_recipe(
        config, stages=stages, num_examples=num_examples, num_classes=num_classes
    )


def parameter_tree(paths) -> dict:
    """A tree with one scalar at every path."""
    tree = {}
    for path in paths:
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.zeros(())
    return tree


def masked_paths(mask) -> set[str]:
    leaves = jax.tree_util.tree_flatten_with_path(mask)[0]
    return {recipes.parameter_path(path) for path, chosen in leaves if chosen}


@pytest.mark.parametrize("dataset", ["imagenet", "imagenet21k", "cifar10ft", "flowersft"])
def test_schedules_of_the_official_configs(dataset):
    entry = reference.load_json("schedules.json")["models"]["efficientnetv2-l"][dataset]
    config = base_config()
    config.model.name = "efficientnetv2-l"
    config.train.update(
        batch_size=entry["batch_size"], epochs=float(entry["epochs"]),
        min_steps=entry["min_steps"], schedule=entry["lr_sched"], learning_rate=entry["lr_base"],
        warmup_epochs=float(entry["warmup_epochs"]), decay_epochs=entry["decay_epochs"],
        decay_factor=entry["decay_factor"],
    )  # fmt: skip
    recipe = read(config, num_examples=entry["train_images"])
    assert recipe.total_steps == entry["train_steps_model_fn"]
    values = recipe.schedule.keywords
    assert values["initial"] == pytest.approx(entry["scaled_lr"])
    assert values["floor"] == entry["scaled_lr_min"]
    assert values["warmup_steps"] == entry["warmup_steps"]
    assert values["decay_steps"] == entry["decay_steps"]


def test_both_rates_scale_with_the_batch_size():
    config = base_config()
    config.train.batch_size = 1024
    config.train.learning_rate = 0.1
    config.train.min_learning_rate = 0.01
    values = read(config).schedule.keywords
    assert values["initial"] == pytest.approx(0.4)
    assert values["floor"] == pytest.approx(0.04)


def test_listed_epochs_set_the_length_of_the_schedule():
    config = base_config()
    config.train.batch_size = 100
    config.progressive.epochs = (3.0, 1.5)
    assert read(config, num_examples=1000).total_steps == 45


def test_defaults_are_the_official_ones():
    official = reference.load_json("schedules.json")["base_config"]["train"]
    recipe = read(base_config())
    assert recipe.optimizer == official["optimizer"]
    assert recipe.ema_decay == official["ema_decay"]
    assert recipe.weight_decay == official["weight_decay"]
    assert recipe.weight_decay_inc == official["weight_decay_inc"]
    assert recipe.label_smoothing == official["label_smoothing"]
    assert recipe.gradient_clip == official["gclip"]
    assert recipe.schedule.keywords["kind"] == official["lr_sched"]
    assert official["weight_decay_exclude"] == OFFICIAL_EXCLUDE


@pytest.mark.parametrize("model", list_models())
def test_weight_decay_reaches_the_same_variables_as_the_official_expression(model):
    names = [
        name
        for name in names_tf.tensor_names(create_model(model).block_specs)
        if name.path.startswith("params/")
    ]
    params = parameter_tree(name.path.removeprefix("params/") for name in names)
    found = masked_paths(recipes.decay_mask(read(base_config()), params))
    expected = {
        name.path.removeprefix("params/")
        for name in names
        if not re.match(OFFICIAL_EXCLUDE, name.theirs)
    }
    assert found == expected
    assert len(found) < len(names)


def test_frozen_parameters_do_not_decay():
    config = base_config()
    config.init.freeze = "(?!classifier)"  # all but the classifier
    params = parameter_tree(["stem/conv/kernel", "classifier/kernel", "classifier/bias"])
    recipe = read(config)
    trained = masked_paths(recipes.trainable_mask(recipe, params))
    assert trained == {"classifier/kernel", "classifier/bias"}
    assert masked_paths(recipes.decay_mask(recipe, params)) == {"classifier/kernel"}


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("blocks_9", "init.freeze: 'blocks_9' matches no parameter"),
        (".*", "init.freeze: '.*' matches every parameter"),
    ],
)
def test_a_freeze_that_cannot_be_meant_is_refused(freeze, message):
    config = base_config()
    config.init.freeze = freeze
    params = parameter_tree(["stem/conv/kernel", "classifier/kernel"])
    with pytest.raises(UserError) as caught:
        recipes.make_optimizer(read(config), params)
    assert message in str(caught.value)


def test_image_options_come_from_the_data_section():
    config = base_config()
    config.data.update(
        preprocessing="v1", augment="autoaugment", flip=False, cutout=True, random_erasing=0.25
    )
    images = read(config).images
    assert images.mean == pytest.approx((123.675, 116.28, 103.53))
    assert images.std == pytest.approx((58.395, 57.12, 57.375))
    assert (images.policy.name, images.flip, images.cutout) == ("autoaugment", False, True)
    assert images.random_erasing == 0.25


def test_mixing_is_in_the_program_if_any_stage_mixes():
    config = base_config()
    assert not read(config).images.use_mixup  # S does not mix
    config.model.name = "efficientnetv2-m"
    images = read(config).images
    assert images.use_mixup
    assert images.use_cutmix
    config.progressive.cutmix_alphas = (0.0, 0.0, 0.0, 0.0)
    images = read(config).images
    assert images.use_mixup
    assert not images.use_cutmix
