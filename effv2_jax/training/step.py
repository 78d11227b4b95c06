"""One training step and one evaluation step, as pure functions over the data mesh.

Every device computes the loss of its part of the global batch divided by the number of devices,
and its gradient; the sum over the devices is the gradient of the mean over the global batch. The
weight decay depends on no example and is added once, after that sum. State and metrics are
replicated; but where the devices divide blocks by channels (`channel_parallel.py`) the state of
those channels is one device's own, and its gradient is whole without a sum. All that changes
between stages but the shapes is a traced argument (the knobs).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from effv2_jax.data import augment
from effv2_jax.data.mix import mix
from effv2_jax.models import lowering
from effv2_jax.models.infer import infer
from effv2_jax.models.layers import example_keys
from effv2_jax.models.lowering import all_reduce
from effv2_jax.models.network import EfficientNet
from effv2_jax.training import channel_parallel, optimizers
from effv2_jax.training.ema import ema_decay, update_ema
from effv2_jax.training.losses import example_losses
from effv2_jax.training.mesh import AXIS
from effv2_jax.training.metrics import TOP_K
from effv2_jax.training.progressive import Stage
from effv2_jax.training.recipe import Recipe, decay_mask, make_optimizer, trainable_mask

Batch = Mapping[str, jax.Array]
Knobs = Mapping[str, jax.typing.ArrayLike]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries from step to step; everything else follows from (seed, step)."""

    step: jax.Array  # int32: steps made
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any  # {"params": ..., "batch_stats": ...}, or {} without moving average
    skipped: jax.Array  # int32: steps whose loss or gradient was not finite


def create_state(recipe: Recipe, variables: Mapping[str, Any]) -> TrainState:
    """Returns the state before the first step.

    Args:
      recipe: of the run.
      variables: {"params", "batch_stats"}; copied, since the step may be given its state to reuse.
    """
    # Two copies: buffers that are given away to the step must not be shared.
    values = jax.tree.map(jnp.array, dict(variables))
    average = jax.tree.map(jnp.array, dict(variables)) if recipe.ema_decay else {}
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=values["params"],
        batch_stats=values["batch_stats"],
        opt_state=make_optimizer(recipe, values["params"]).init(values["params"]),
        ema=average,
        skipped=jnp.zeros([], jnp.int32),
    )


def stage_knobs(stage: Stage, recipe: Recipe, *, seed: int) -> dict[str, np.ndarray]:
    """Returns a stage's values as the arrays that the training step takes.

    Args:
      stage: see `progressive.Stage`.
      recipe: of the run.
      seed: of the run, any whole number; its lowest 32 bits count.
    """
    return {
        "seed": np.uint32(seed % 2**32),
        "dropout_rate": np.float32(stage.dropout_rate),
        "mixup_alpha": np.float32(stage.mixup_alpha),
        "cutmix_alpha": np.float32(stage.cutmix_alpha),
        "augment_table": recipe.images.policy.table(stage.magnitude),
        "schedule_start": np.float32(stage.schedule_start),
        "stage_start_step": np.int32(stage.start_step),
        "schedule_scale": np.float32(stage.schedule_scale),
        "lr_scale": np.float32(stage.lr_scale),
    }


def make_train_step(
    model: nn.Module, recipe: Recipe, *, mesh: Mesh
) -> Callable[[TrainState, Batch, Knobs], tuple[TrainState, Metrics]]:
    """Builds the training step.

    Args:
      model: network as of `channel_parallel.for_mesh`, or with axis_name="data".
      recipe: of the run.
      mesh: one axis, "data".

    Returns:
      A pure function (state, batch, knobs) -> (state, metrics), not yet compiled; metrics are
      replicated, the state lies as `channel_parallel.shardings` says for such a batch. batch:
      "image" uint8 [N, S, S, 3] (float32 means: already normalised, neither flipped nor augmented)
      and "label" int32 [N] or float32 [N, C]; N is global and divisible by the mesh. knobs: see
      `stage_knobs`. metrics, float32 scalars: loss (with L2), xent (without), l2, lr,
      weight_decay, grad_norm and grad_norm_max before clipping, top1 of the training batch (the
      best class has the largest label, however labels are mixed), finite (1 or 0). A step whose
      loss or gradient is not finite leaves everything but `step` and `skipped` as it was.
    """
    if recipe.freeze:
        model = model.clone(freeze=recipe.freeze)

    def local_step(state: TrainState, batch: Batch, knobs: Knobs) -> tuple[TrainState, Metrics]:
        result = local_gradients(model, recipe, state, batch, knobs)
        squared_norms = functools.partial(
            channel_parallel.squared_norms, blocks=_divided_blocks(model, batch)
        )
        norms = optimizers.gradient_norms(result.gradients, squared_norms=squared_norms)
        new = apply_gradients(
            state,
            result.gradients,
            result.batch_stats,
            learning_rate=result.metrics["lr"],
            recipe=recipe,
            squared_norms=squared_norms,
        )
        finite = jnp.isfinite(result.metrics["loss"]) & jnp.isfinite(norms.all)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {
            **result.metrics,
            "grad_norm": norms.all,
            "grad_norm_max": norms.largest,
            "finite": finite.astype(jnp.float32),
        }
        skipped = state.skipped + jnp.where(finite, 0, 1)
        return kept.replace(step=state.step + 1, skipped=skipped), metrics

    def train_step(state: TrainState, batch: Batch, knobs: Knobs) -> tuple[TrainState, Metrics]:
        blocks = model.channel_parallel_blocks(batch["image"].shape)
        specs = channel_parallel.partition_specs(state, blocks)
        return jax.shard_map(
            local_step,
            mesh=mesh,
            in_specs=(specs, PartitionSpec(AXIS), PartitionSpec()),
            out_specs=(specs, PartitionSpec()),
            check_vma=False,
        )(state, batch, knobs)

    return train_step


class Gradients(NamedTuple):
    """Of the global batch's loss; the same on every device, but for parts of divided variables."""

    gradients: Any  # as the parameters; 0 for frozen ones
    batch_stats: Any  # after the batch
    metrics: Metrics  # loss, xent, l2, lr, weight_decay, top1


def local_gradients(
    model: nn.Module, recipe: Recipe, state: TrainState, batch: Batch, knobs: Knobs
) -> Gradients:
    """Returns loss and gradients for the global batch; called on every device with its part of it.

    Only inside `jax.shard_map` over the data mesh. Arguments as in `make_train_step`.
    """
    keys = step_keys(knobs["seed"], state.step)
    images, labels = prepare_images(batch, knobs, keys, recipe)
    global_batch = images.shape[0] * jax.lax.axis_size(AXIS)
    trainable = trainable_mask(recipe, state.params)

    def local_loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        params = jax.tree.map(
            lambda p, trained: p if trained else jax.lax.stop_gradient(p), params, trainable
        )
        logits, mutated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            dropout_rate=knobs["dropout_rate"],
            rngs={"dropout": keys["dropout"]},
            mutable=["batch_stats"],
        )
        losses = example_losses(
            logits,
            labels,
            kind=recipe.loss,
            label_smoothing=recipe.label_smoothing,
            multilabel=recipe.multilabel,
        )
        return jnp.sum(losses) / global_batch, (logits, mutated["batch_stats"])

    (xent, (logits, batch_stats)), gradients = jax.value_and_grad(local_loss, has_aux=True)(
        state.params
    )
    best = jnp.argmax(logits, -1, keepdims=True)
    hits = jnp.take_along_axis(labels, best, -1)[:, 0] >= jnp.max(labels, -1)
    blocks = _divided_blocks(model, batch)
    divided = channel_parallel.is_divided(gradients, blocks)
    # None, which is no leaf, in the place of those that are whole already.
    summed = jax.tree.map(lambda g, own: None if own else g, gradients, divided)
    summed, xent, hits = all_reduce.psum(
        (summed, xent, jnp.sum(hits, dtype=jnp.float32)),
        AXIS,
        joined_bytes=lowering.choose(model.lowering).joined_bytes,
    )
    gradients = jax.tree.map(lambda g, own, total: g if own else total, gradients, divided, summed)

    schedule_step = knobs["schedule_start"] + knobs["schedule_scale"] * (
        state.step - knobs["stage_start_step"]
    )
    growth = recipe.weight_decay_inc * schedule_step / recipe.total_steps
    decay = recipe.weight_decay * (1 + growth)
    l2 = jnp.float32(0)
    if recipe.weight_decay:  # or two passes over all parameters would add nothing
        l2, gradients = add_weight_decay(
            gradients,
            state.params,
            decay=decay,
            mask=decay_mask(recipe, state.params),
            squared_norms=functools.partial(channel_parallel.squared_norms, blocks=blocks),
        )
    metrics = {
        "loss": xent + l2,
        "xent": xent,
        "l2": l2,
        "lr": recipe.schedule(schedule_step) * knobs["lr_scale"],
        "weight_decay": decay,
        "top1": hits / global_batch,
    }
    return Gradients(gradients, batch_stats, metrics)


def _divided_blocks(model: EfficientNet, batch: Batch) -> range:
    """The blocks that the devices divide by channels, from a device's part of the batch."""
    images, *rest = batch["image"].shape
    return model.channel_parallel_blocks((images * model.channel_parallel, *rest))


def step_keys(seed: jax.typing.ArrayLike, step: jax.Array) -> dict[str, jax.Array]:
    """Returns the random keys of a step, one per purpose: functions of (seed, step) alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(("images", "mix", "dropout"))}


def prepare_images(
    batch: Batch, knobs: Knobs, keys: Mapping[str, jax.Array], recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
    """Turns a device's part of a training batch into what the network is trained on.

    The official order: flip, random operations on uint8, normalise, cutout, mix.

    Args:
      batch: "image" [n, S, S, 3] uint8, or float32 that is already normalised and is only mixed;
        "label" int32 [n] or float32 [n, C].
      knobs: see `stage_knobs`.
      keys: see `step_keys`.
      recipe: of the run.

    Returns:
      Images float32 [n, S, S, 3], normalised, and labels float32 [n, C].
    """
    images, how = batch["image"], recipe.images
    if images.dtype == jnp.uint8:
        image_keys = example_keys(keys["images"], images.shape[0], axis_name=AXIS)
        if how.flip:
            images = augment.flip(images, image_keys)
        images = augment.augment(images, image_keys, knobs["augment_table"], how.policy)
        images = normalize(images, recipe)
        if how.cutout:
            images = augment.finetune_cutout(images, image_keys)
        if how.random_erasing:
            images = augment.random_erasing(images, image_keys, how.random_erasing)
    labels = class_labels(batch["label"], recipe.num_classes)
    if how.use_mixup or how.use_cutmix:
        images, labels = mix(
            images,
            labels,
            keys["mix"],
            mixup_alpha=knobs["mixup_alpha"],
            cutmix_alpha=knobs["cutmix_alpha"],
            use_mixup=how.use_mixup,
            use_cutmix=how.use_cutmix,
            axis_name=AXIS,
        )
    return images, labels


def normalize(images: jax.Array, recipe: Recipe) -> jax.Array:
    """Returns (images - mean) / std, float32 [N, H, W, 3]; images in 0..255 of any dtype."""
    mean = jnp.asarray(recipe.images.mean, jnp.float32)
    std = jnp.asarray(recipe.images.std, jnp.float32)
    return (images.astype(jnp.float32) - mean) / std


def class_labels(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns labels float32 [N, C] from class numbers int [N], or as they are."""
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return labels.astype(jnp.float32)


def add_weight_decay(
    gradients: Any,
    params: Any,
    *,
    decay: jax.Array,
    mask: Any,
    squared_norms: optimizers.SquaredNorms = optimizers.squared_norms,
) -> tuple[jax.Array, Any]:
    """Returns the L2 loss, decay * sum(p^2) / 2 over the masked parameters, and new gradients."""
    squares = [
        square / 2
        for square, decays in zip(
            jax.tree.leaves(squared_norms(params)), jax.tree.leaves(mask), strict=True
        )
        if decays
    ]
    gradients = jax.tree.map(
        lambda g, p, decays: g + decay * p if decays else g, gradients, params, mask
    )
    return decay * sum(squares, start=jnp.float32(0)), gradients


def apply_gradients(
    state: TrainState,
    gradients: Any,
    batch_stats: Any,
    *,
    learning_rate: jax.Array,
    recipe: Recipe,
    squared_norms: optimizers.SquaredNorms = optimizers.squared_norms,
) -> TrainState:
    """Clips, updates the parameters and then their average; `step` counts one more."""
    if recipe.gradient_clip:
        gradients = optimizers.clip_gradients(
            gradients, recipe.gradient_clip, squared_norms=squared_norms
        )
    optimizer = make_optimizer(recipe, state.params)
    updates, opt_state = optimizer.update(
        gradients, state.opt_state, state.params, learning_rate=learning_rate
    )
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema = state.ema
    if recipe.ema_decay:
        ema = update_ema(
            ema,
            {"params": params, "batch_stats": batch_stats},
            decay=ema_decay(recipe.ema_decay, step),
        )
    return state.replace(
        step=step, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
    )


def make_eval_step(
    model: EfficientNet, recipe: Recipe, *, mesh: Mesh
) -> Callable[[Mapping[str, Any], Batch], Metrics]:
    """Builds the evaluation step.

    Args:
      model: the network of the training step.
      recipe: of the run.
      mesh: one axis, "data".

    Returns:
      A pure function (variables, batch) -> sums over the examples with mask 1, float32 scalars,
      replicated: loss (no smoothing, no L2), top1, top5, count. variables: {"params",
      "batch_stats"}, raw or averaged. batch: "image" float32 or uint8 [N, S, S, 3] in 0..255, not
      normalised, "label" as in training, "mask" float32 [N]. An example is a hit if the best class
      (one of the best five) is a label of it.
    """

    def local_eval(variables: Mapping[str, Any], batch: Batch) -> Metrics:
        logits = infer(model, variables, normalize(batch["image"], recipe))
        labels = class_labels(batch["label"], recipe.num_classes)
        losses = example_losses(logits, labels, kind=recipe.loss, multilabel=recipe.multilabel)
        best = jax.lax.top_k(logits, min(TOP_K, logits.shape[-1]))[1]
        hits = jnp.take_along_axis(labels, best, axis=-1) > 0  # [n, 5], best first
        counted = batch["mask"] > 0
        sums = {
            # where, not a product: padding may have a loss that is not a number
            "loss": jnp.sum(jnp.where(counted, losses, 0.0)),
            "top1": jnp.sum(counted & hits[:, 0], dtype=jnp.float32),
            "top5": jnp.sum(counted & jnp.any(hits, -1), dtype=jnp.float32),
            "count": jnp.sum(counted, dtype=jnp.float32),
        }
        return jax.lax.psum(sums, AXIS)

    return jax.shard_map(
        local_eval,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
