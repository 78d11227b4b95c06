"""Inference: the network, with as many images in each layer as are fast together.

Which these are on a backend is said in `lowering.TABLE`.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models import lowering
from effv2_jax.models.network import EfficientNet

Array = jax.Array


def infer(model: EfficientNet, variables: Mapping[str, Any], images: Array) -> Array:
    """Applies a network in inference mode, a few images at a time where that is faster.

    Args:
      model: the network.
      variables: {"params", "batch_stats"} of it.
      images: [N, H, W, 3], normalised; those of this device under `jax.shard_map`.

    Returns:
      What `model.apply(variables, images)` does, to rounding.
    """
    count, *size = images.shape[:3]
    forms, dtype = lowering.choose(model.lowering), jnp.dtype(model.dtype)
    few = [forms.images_at_once(count, pixels, dtype) for pixels in model.input_pixels(size)]
    x, first = images, 0
    for together, group in itertools.groupby(few):
        only = range(first, first + len(list(group)))
        first = only.stop
        apply = functools.partial(model.apply, variables, only=only)
        x = apply(x) if together == count else _in_parts(apply, x, together)
    return x


def round_kernels(model: EfficientNet, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds the kernels of convolutions once, for many calls of `infer` with the same variables.

    A network of a 16-bit type otherwise rounds them in every call.

    Args:
      model: the network.
      variables: {"params", "batch_stats"} of it, float32.

    Returns:
      The variables with these kernels in the network's `dtype`, to which it would cast them.
      What it makes of them is equal to the last bit.
    """

    def round_kernel(path: tuple[Any, ...], leaf: Array) -> Array:
        of_convolution = path[-1].key == "kernel" and leaf.ndim == 4
        return leaf.astype(model.dtype) if of_convolution else leaf

    params = jax.tree_util.tree_map_with_path(round_kernel, variables["params"])
    return {**variables, "params": params}


def _in_parts(apply: Callable[[Array], Array], x: Array, together: int) -> Array:
    """Applies a function to so many images at a time."""
    # The parts are no argument of `map`: XLA's CPU backend would copy all images into its loop.
    results = lax.map(
        lambda first: apply(lax.dynamic_slice_in_dim(x, first, together)),
        jnp.arange(0, len(x), together),
    )
    return results.reshape(len(x), *results.shape[2:])
