"""Learning-rate schedules of the released code, in float32 as TensorFlow computes them.

A schedule is a function of the base step (see `progressive.Stage`): int or float32, may be traced.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

KINDS = ("exponential", "cosine", "linear", "constant")


def make_schedule(
    kind: str,
    learning_rate: float,
    *,
    total_steps: float,
    steps_per_epoch: float = 0.0,
    warmup_epochs: float = 0.0,
    min_learning_rate: float = 0.0,
    decay_epochs: float = 2.4,
    decay_factor: float = 0.97,
) -> Schedule:
    """Builds a schedule (official: utils.py WarmupLearningRateSchedule).

    Decay counts from step 0, not from the end of the warm-up. The floor min_learning_rate is
    applied before the warm-up, which may therefore be below it; the warm-up starts at 0.

    Args:
      kind: exponential (a staircase), cosine, linear or constant.
      learning_rate: at step 0 without warm-up; already scaled by the batch size.
      total_steps: length of the run in base steps; may have a fraction. Past it, which no
        run goes, cosine rises again and linear falls below 0 if there is no floor, as officially.
      steps_per_epoch: may have a fraction.
      warmup_epochs: int(warmup_epochs * steps_per_epoch) steps.
      min_learning_rate: scaled as learning_rate.
      decay_epochs: exponential: length of a stair.
      decay_factor: exponential: factor per stair.

    Returns:
      A function of the base step; its value is a float32 scalar.
    """
    return functools.partial(
        _learning_rate,
        kind=kind,
        initial=learning_rate,
        total_steps=total_steps,
        warmup_steps=int(warmup_epochs * steps_per_epoch),
        floor=min_learning_rate,
        decay_steps=steps_per_epoch * decay_epochs,
        decay_factor=decay_factor,
    )


def _learning_rate(
    step: jax.typing.ArrayLike,
    *,
    kind: str,
    initial: float,
    total_steps: float,
    warmup_steps: int,
    floor: float,
    decay_steps: float,
    decay_factor: float,
) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    initial = jnp.float32(initial)
    if kind == "exponential":
        stairs = jnp.floor(_divide(step, decay_steps))
        rate = initial * jnp.power(jnp.float32(decay_factor), stairs)
    elif kind == "cosine":
        rate = 0.5 * initial * (1 + jnp.cos(_divide(jnp.pi * step, total_steps)))
    elif kind == "linear":
        rate = initial * (1 - _divide(step, total_steps))
    elif kind == "constant":
        rate = initial
    else:
        raise ValueError(f"schedule {kind!r} is none of {', '.join(KINDS)}")
    if floor:
        rate = jnp.maximum(rate, jnp.float32(floor))
    if warmup_steps:
        rate = jnp.where(step < warmup_steps, _divide(initial * step, warmup_steps), rate)
    return rate


def _divide(x: jax.Array, constant: float) -> jax.Array:
    """Returns x / constant, correctly rounded under jit too.

    Without the barrier XLA multiplies by 1 / constant: 41 / 41 becomes 0.99999994, and a stair
    of 41 steps would end one step late.
    """
    return x / jax.lax.optimization_barrier(jnp.float32(constant))
