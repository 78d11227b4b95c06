"""The training recipe: everything of a step that stays the same over a run, read from a config."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from effv2_jax.data import policy as policies
from effv2_jax.data import preprocess
from effv2_jax.errors import UserError
from effv2_jax.training import optimizers, progressive, schedules

NO_POLICY = policies.make_policy("none")

# The official learning rates are given for this batch size (official: main.py).
BASE_BATCH_SIZE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """What the step does with a batch of images before the network sees them.

    Attributes:
      mean: of the normalisation (x - mean) / std, one value per channel, in 0..255.
      std: likewise.
      flip: mirror left-right with probability 1/2.
      policy: random operations on uint8 images.
      cutout: the 'ft' cutout on normalised images.
      random_erasing: probability per image, on normalised images.
      use_mixup: whether any stage has a positive alpha; False leaves it out of the program.
      use_cutmix: likewise.
    """

    mean: tuple[float, ...] = (128.0, 128.0, 128.0)
    std: tuple[float, ...] = (128.0, 128.0, 128.0)
    flip: bool = False
    policy: policies.Policy = NO_POLICY
    cutout: bool = False
    random_erasing: float = 0.0
    use_mixup: bool = False
    use_cutmix: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; see `config.train` for units. Hashable and free of arrays."""

    num_classes: int
    schedule: schedules.Schedule
    total_steps: float  # base steps; the growth of the weight decay refers to it
    optimizer: str = "rmsprop"
    loss: str = "softmax"
    label_smoothing: float = 0.0
    multilabel: bool = False
    weight_decay: float = 0.0
    weight_decay_inc: float = 0.0
    weight_decay_exclude: str = ".*/(bias|scale)"
    decoupled_weight_decay: float = 0.0
    gradient_clip: float = 0.0
    ema_decay: float = 0.0
    freeze: str = ""
    images: Images = Images()


def make_recipe(
    config: Any, *, stages: Sequence[progressive.Stage], num_examples: int, num_classes: int
) -> Recipe:
    """Reads a config.

    Args:
      config: the complete config.
      stages: of the run (`progressive.make_stages`).
      num_examples: training examples per epoch.
      num_classes: of the network.

    Returns:
      The recipe.
    """
    train = config.train
    total_steps = progressive.schedule_length(config, num_examples=num_examples)
    scale = train.batch_size / BASE_BATCH_SIZE
    return Recipe(
        num_classes=num_classes,
        schedule=schedules.make_schedule(
            train.schedule,
            train.learning_rate * scale,
            total_steps=total_steps,
            steps_per_epoch=num_examples / train.batch_size,
            warmup_epochs=train.warmup_epochs,
            min_learning_rate=train.min_learning_rate * scale,
            decay_epochs=train.decay_epochs,
            decay_factor=train.decay_factor,
        ),
        total_steps=total_steps,
        optimizer=train.optimizer,
        loss=train.loss,
        label_smoothing=train.label_smoothing,
        multilabel=config.data.multilabel,
        weight_decay=train.weight_decay,
        weight_decay_inc=train.weight_decay_inc,
        weight_decay_exclude=train.weight_decay_exclude,
        decoupled_weight_decay=train.decoupled_weight_decay,
        gradient_clip=train.gradient_clip,
        ema_decay=train.ema_decay,
        freeze=config.init.freeze,
        images=_make_images(config.data, stages),
    )


def _make_images(data: Any, stages: Sequence[progressive.Stage]) -> Images:
    kind = preprocess.get_kind(data.preprocessing)
    return Images(
        mean=kind.mean,
        std=kind.std,
        flip=data.flip,
        policy=policies.make_policy(data.augment, layers=data.augment_layers),
        cutout=data.cutout,
        random_erasing=data.random_erasing,
        use_mixup=any(stage.mixup_alpha > 0 for stage in stages),
        use_cutmix=any(stage.cutmix_alpha > 0 for stage in stages),
    )


def make_optimizer(recipe: Recipe, params: optax.Params) -> optimizers.Optimizer:
    """Builds the optimizer for parameters of this structure (arrays or shapes)."""
    optimizer = optimizers.make_optimizer(recipe.optimizer)
    if recipe.freeze:
        optimizer = optimizers.only_trainable(optimizer, trainable_mask(recipe, params))
    if recipe.decoupled_weight_decay:
        optimizer = optimizers.decoupled_decay(
            optimizer, recipe.decoupled_weight_decay, mask=decay_mask(recipe, params)
        )
    return optimizer


def trainable_mask(recipe: Recipe, params: optax.Params) -> optax.Params:
    """Returns a tree of bool: True where a parameter is trained, i.e. does not match `freeze`.

    Raises:
      UserError: the expression matches no parameter or all of them.
    """
    if not recipe.freeze:
        return jax.tree.map(lambda _: True, params)
    pattern = re.compile(recipe.freeze)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: pattern.match(parameter_path(path)) is None, params
    )
    trained = jax.tree.leaves(mask)
    if all(trained) or not any(trained):
        paths = [parameter_path(p) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        raise UserError(
            f"init.freeze: {recipe.freeze!r} matches {'no' if all(trained) else 'every'} parameter "
            f"of the network; the {len(paths)} paths are like {paths[0]}, {paths[-1]} (re.match)"
        )
    return mask


def decay_mask(recipe: Recipe, params: optax.Params) -> optax.Params:
    """Returns a tree of bool: True where weight decay applies.

    Frozen parameters do not decay. The official code excludes '.*(bias|gamma|beta).*' by its own
    names; the default '.*/(bias|scale)' is the same set by ours.
    """
    pattern = re.compile(recipe.weight_decay_exclude)
    return jax.tree_util.tree_map_with_path(
        lambda path, _, trained: trained and pattern.fullmatch(parameter_path(path)) is None,
        params,
        trainable_mask(recipe, params),
    )


def parameter_path(path: jax.tree_util.KeyPath) -> str:
    """Returns a parameter's path as it is written in configs: "blocks_3/expand_conv/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
