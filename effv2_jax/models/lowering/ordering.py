"""Makes XLA compute one thing after another."""

import jax
import jax.numpy as jnp
from jax import lax


def barrier(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x; what is computed from the result waits for y."""
    return lax.optimization_barrier((x, y))[0]


def arithmetic(x: jax.Array, y: jax.Array) -> jax.Array:
    """The same on any backend: XLA's for CPUs drops barriers before it puts operations in order.

    Adds a 0 made of an element of y, which XLA does not know to be one.

    Args:
        x: any shape, floating point.
        y: any shape but empty; where its first element is not a number, the result is none either.
    """
    first = y[(0,) * y.ndim]
    zero = jnp.minimum(jnp.abs(first), 0)
    return x + zero.astype(x.dtype)
