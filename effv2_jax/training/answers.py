"""What a network answers to each example: the step of --mode eval, which keeps them all."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from effv2_jax.data.kinds import Kind
from effv2_jax.models.infer import infer
from effv2_jax.models.network import EfficientNet
from effv2_jax.training.losses import example_losses
from effv2_jax.training.mesh import AXIS
from effv2_jax.training.metrics import TOP_K, Answers
from effv2_jax.training.step import Batch, class_labels

# The logit of a class that the network does not have. Not -inf: times a label of 0 it must be 0.
_NEVER = -1e30


def make_answer_step(
    model: EfficientNet,
    *,
    kind: Kind,
    loss: str,
    multilabel: bool = False,
    subset: np.ndarray | None = None,
    mesh: Mesh,
) -> Callable[[Mapping[str, Any], Batch], dict[str, jax.Array]]:
    """Builds the step.

    Args:
        model: the network.
        kind: of preprocessing, for the normalisation.
        loss: one of `losses.KINDS`.
        multilabel: labels are multi-hot; an answer is right if it is one of them.
        subset: int [classes], the outputs that stand for the classes of the data set, -1 where the
            network has none; None: all, in order.
        mesh: one axis, "data".

    Returns:
        A pure function (variables, batch) -> the fields of `Answers` for every row of the batch,
        and its "mask" float32 [N]; all replicated, so that every process has all. batch: as of
        `step.make_eval_step`.
    """
    mean, std = np.asarray(kind.mean, np.float32), np.asarray(kind.std, np.float32)

    def local_answers(variables: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
        images = (batch["image"].astype(jnp.float32) - mean) / std
        logits = infer(model, variables, images)
        known = jnp.ones(logits.shape[0], bool)
        if subset is not None:
            logits = jnp.where(subset >= 0, logits[:, subset], _NEVER)
            known = jnp.asarray(subset)[batch["label"]] >= 0
        labels = class_labels(batch["label"], logits.shape[-1])
        losses = example_losses(logits, labels, kind=loss, multilabel=multilabel)
        top = jax.lax.top_k(logits, min(TOP_K, logits.shape[-1]))
        hits = jnp.take_along_axis(labels, top[1], axis=-1) > 0  # [n, 5], best first
        rank = jnp.where(jnp.any(hits, -1), jnp.argmax(hits, -1), TOP_K)
        if loss == "softmax":
            confidence = jnp.exp(top[0][:, 0] - jax.nn.logsumexp(logits, -1))
        else:
            confidence = jax.nn.sigmoid(top[0][:, 0])
        single = batch["label"].ndim == 1
        answers = {
            "label": batch["label"] if single else jnp.full(logits.shape[0], -1, jnp.int32),
            "best": top[1][:, 0],
            "rank": rank.astype(jnp.int32),
            "confidence": confidence,
            "loss": jnp.where(known, losses, 0.0),
            "known": known,
            "mask": batch["mask"],
        }
        return jax.lax.all_gather(answers, AXIS, tiled=True)

    return jax.shard_map(
        local_answers,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


def join_answers(batches: list[Mapping[str, np.ndarray]]) -> Answers:
    """Returns the answers of all batches, padding and broken pictures left out."""
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    kept = whole.pop("mask") > 0
    return Answers(**{name: values[kept] for name, values in whole.items()})
