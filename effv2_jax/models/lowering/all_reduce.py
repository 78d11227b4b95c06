"""Sums and means over the devices of a mesh."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def psum(
    tree: Any,
    axis_name: str,
    *,
    joined_bytes: int,
    axis_index_groups: list[list[int]] | None = None,
) -> Any:
    """`jax.lax.psum`, with small arrays joined to one; the sums are the same to the last bit.

    On CPUs the devices wait for each other at every array of an all-reduce, even where one
    instruction takes them all: a thread goes to sleep and is woken again each time. One device
    alone would copy every array.

    Args:
        tree: arrays of any shapes and types.
        axis_name: of the mesh, inside `jax.shard_map`.
        joined_bytes: arrays of at most so many bytes are joined, those of each type; 0: none.
        axis_index_groups: as in `jax.lax.psum`.

    Returns:
        The sums, shapes and types as in `tree`.
    """
    if _devices(axis_name, axis_index_groups) == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    small: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.nbytes <= joined_bytes:
            small.setdefault(leaf.dtype, []).append(i)
    alone = sorted(set(range(len(leaves))).difference(*small.values()))
    messages = [jnp.concatenate([leaves[i].ravel() for i in group]) for group in small.values()]
    messages, sums = lax.psum(
        (messages, [leaves[i] for i in alone]), axis_name, axis_index_groups=axis_index_groups
    )
    summed = dict(zip(alone, sums, strict=True))
    for group, message in zip(small.values(), messages, strict=True):
        ends = list(itertools.accumulate(leaves[i].size for i in group))
        for i, part in zip(group, jnp.split(message, ends[:-1]), strict=True):
            summed[i] = part.reshape(leaves[i].shape)
    return structure.unflatten([summed[i] for i in range(len(leaves))])


def pmean(
    tree: Any,
    axis_name: str,
    *,
    joined_bytes: int,
    axis_index_groups: list[list[int]] | None = None,
) -> Any:
    """`jax.lax.pmean`, with small arrays joined to one; arguments as those of `psum`."""
    groups = axis_index_groups
    sums = psum(tree, axis_name, joined_bytes=joined_bytes, axis_index_groups=groups)
    devices = _devices(axis_name, groups)
    return jax.tree.map(lambda total: total / devices, sums)


def _devices(axis_name: str, groups: list[list[int]] | None) -> int:
    """How many devices a sum goes over."""
    return len(groups[0]) if groups else lax.axis_size(axis_name)
