"""Classification losses, one value per example (official: main.py and utils.py).

All functions take logits float32 [N, C] and labels float32 [N, C] (one-hot, mixed or multi-hot) and
return float32 [N]; the loss of a batch is the mean over its examples.
"""

import jax
import jax.numpy as jnp

KINDS = ("softmax", "sigmoid", "summed_sigmoid")


def example_losses(
    logits: jax.Array,
    labels: jax.Array,
    *,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
    multilabel: bool = False,
) -> jax.Array:
    """Returns the loss of every example.

    Args:
      logits: float32 [N, C].
      labels: float32 [N, C].
      kind: softmax: cross-entropy of softmax(logits), labels smoothed to l (1 - s) + s / C.
        sigmoid: MEAN over the classes of the binary cross-entropies, labels l (1 - s) + 0.5 s.
        summed_sigmoid (officially 'custom'): their SUM; label_smoothing has no effect.
      label_smoothing: s, in [0, 1).
      multilabel: labels are multi-hot; for softmax they are divided by their sum. A row without
        any label then gives NaN, as officially: 0 / 0 has no answer, and a silent 0 would hide
        unlabelled examples. Use a sigmoid loss for data that have such rows.

    Returns:
      float32 [N].
    """
    num_classes = logits.shape[-1]
    if kind == "softmax":
        if multilabel:
            labels = labels / jnp.sum(labels, -1, keepdims=True)
        if label_smoothing:
            labels = labels * (1 - label_smoothing) + label_smoothing / num_classes
        return -jnp.sum(labels * jax.nn.log_softmax(logits), -1)
    if kind == "sigmoid":
        if label_smoothing:
            labels = labels * (1 - label_smoothing) + 0.5 * label_smoothing
        return jnp.mean(_sigmoid_losses(logits, labels), -1)
    if kind == "summed_sigmoid":
        return jnp.sum(_sigmoid_losses(logits, labels), -1)
    raise ValueError(f"loss {kind!r} is none of {', '.join(KINDS)}")


def _sigmoid_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross-entropies [N, C] in the form that neither overflows nor cancels."""
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
