"""How given operations are applied to a batch of images: per image, or all at once.

The choice of one operation in 16 per image is what costs: `vmap` of `lax.switch` runs all 16.
Hence two implementations with equal results: "map" goes over the images and runs the chosen
operation only (for CPUs), "batch" applies each of the five kinds of operation to all images once
and selects (for GPUs and TPUs, where images one after another would leave the device idle).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effv2_jax.data import augment_ops as ops
from effv2_jax.data.policy import OPERATIONS
from effv2_jax.errors import UserError

IMPLEMENTATIONS = ("auto", "map", "batch")

# By number; the last is IDENTITY.
_NAMES = (*OPERATIONS, "Identity")

# What an image gets: operations int32 [L], arguments float32 [L, 2], centres int32 [L, 2].
Plan = tuple[jax.Array, jax.Array, jax.Array]


def apply_operations(
    images: jax.Array,
    operations: jax.Array,
    *,
    arguments: jax.Array,
    centres: jax.Array,
    implementation: str = "auto",
) -> jax.Array:
    """Applies given operations, L per image, one after the other.

    Args:
      images: uint8 [N, H, W, 3].
      operations: int32 [N, L], indices into OPERATIONS, or IDENTITY.
      arguments: float32 [N, L, 2], see `policy.operation_arguments`.
      centres: int32 [N, L, 2], row and column of Cutout's square.
      implementation: "map", "batch" (see above), or "auto": by the platform that is compiled for.

    Returns:
      uint8 [N, H, W, 3].

    Raises:
      UserError: for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"augment implementation is {implementation!r}, expected one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    inputs = (images, operations, arguments, centres)
    if implementation == "map":
        return _apply_map(*inputs)
    if implementation == "batch":
        return _apply_batch(*inputs)
    return jax.lax.platform_dependent(*inputs, cpu=_apply_map, default=_apply_batch)


def _rank(names: Sequence[str]) -> np.ndarray:
    """For every operation its index in `names`, or 0 where it is none of them."""
    names = list(names)
    return np.asarray([names.index(n) if n in names else 0 for n in _NAMES])


def _is_any(operation: jax.Array, names: Sequence[str]) -> jax.Array:
    return jnp.asarray(np.asarray([n in names for n in _NAMES]))[operation]


def _matrix(image: jax.Array, operation: jax.Array, arguments: jax.Array) -> jax.Array:
    """The map of an operation of the affine kind; making all five costs next to nothing."""
    matrices = jnp.stack([make(image, arguments) for make in ops.MATRICES.values()])
    return matrices[jnp.asarray(_rank(ops.MATRICES))[operation]]


def _apply_map(
    images: jax.Array, operations: jax.Array, arguments: jax.Array, centres: jax.Array
) -> jax.Array:
    kinds = [ops.TABLES, ops.MATRICES, ("Color",), ("Sharpness",), ("Cutout",), ("Identity",)]
    kind_of = np.asarray([[n in names for names in kinds].index(True) for n in _NAMES])

    def layer(image: jax.Array, step: Plan) -> tuple[jax.Array, None]:
        operation, values, centre = step

        def by_table(image: jax.Array) -> jax.Array:
            # Through a switch also because XLA would otherwise compute the table per pixel.
            rank = jnp.asarray(_rank(ops.TABLES))[operation]
            makers = list(ops.TABLES.values())
            return ops.apply_table(image, jax.lax.switch(rank, makers, image, values))

        branches = [
            by_table,
            lambda image: ops.apply_affine(image, _matrix(image, operation, values)),
            lambda image: ops.color(image, values[0]),
            lambda image: ops.sharpness(image, values[0]),
            lambda image: _cutout(image, values, centre),
            lambda image: image,
        ]
        return jax.lax.switch(jnp.asarray(kind_of)[operation], branches, image), None

    def one(inputs: tuple[jax.Array, Plan]) -> jax.Array:
        image, steps = inputs
        return jax.lax.scan(layer, image, steps)[0]

    return jax.lax.map(one, (images, (operations, arguments, centres)))


def _apply_batch(
    images: jax.Array, operations: jax.Array, arguments: jax.Array, centres: jax.Array
) -> jax.Array:
    def tables(image: jax.Array, operation: jax.Array, values: jax.Array) -> jax.Array:
        def equalize(image: jax.Array, _: jax.Array) -> jax.Array:
            return ops.equalize_table(image, wanted=_is_any(operation, ("Equalize",)))

        makers = {**ops.TABLES, "Equalize": equalize}
        made = jnp.stack([make(image, values) for make in makers.values()])
        table = made[jnp.asarray(_rank(ops.TABLES))[operation]]
        return jnp.where(_is_any(operation, ops.TABLES), table, ops.identity_table())

    def one(
        image: jax.Array,
        table: jax.Array,
        operation: jax.Array,
        values: jax.Array,
        centre: jax.Array,
    ) -> jax.Array:
        result = ops.apply_table(image, table)
        changes = [
            (ops.MATRICES, ops.apply_affine(image, _matrix(image, operation, values))),
            (("Color",), ops.color(image, values[0])),
            (("Sharpness",), ops.sharpness(image, values[0])),
            (("Cutout",), _cutout(image, values, centre)),
        ]
        for names, changed in changes:
            result = jnp.where(_is_any(operation, names), changed, result)
        return result

    def layer(batch: jax.Array, step: Plan) -> tuple[jax.Array, None]:
        operation, values, centre = step
        # The barrier keeps XLA from computing the tables once per pixel.
        table = jax.lax.optimization_barrier(jax.vmap(tables)(batch, operation, values))
        return jax.vmap(one)(batch, table, operation, values, centre), None

    steps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (operations, arguments, centres))
    return jax.lax.scan(layer, images, steps)[0]


def _cutout(image: jax.Array, values: jax.Array, centre: jax.Array) -> jax.Array:
    return ops.cutout(image, pad=values[0].astype(jnp.int32), y=centre[0], x=centre[1])
