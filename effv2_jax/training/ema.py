"""Exponential moving average of parameters and statistics (official: main.py, TensorFlow's EMA)."""

from typing import Any

import jax
import jax.numpy as jnp


def ema_decay(decay: float, updates: jax.typing.ArrayLike) -> jax.Array:
    """Returns the decay after `updates` steps: min(decay, (1 + n) / (10 + n)), float32.

    n counts the step just made, so the first average uses 2/11: a short run is not dominated by
    its random start.
    """
    n = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))


def update_ema(average: Any, values: Any, *, decay: jax.typing.ArrayLike) -> Any:
    """Returns average - (1 - decay) (average - value), leaf by leaf."""
    rate = 1 - decay
    return jax.tree.map(lambda a, v: a - rate * (a - v), average, values)
