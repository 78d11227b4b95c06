"""Batch normalisation, its activation and squeeze-and-excite for GPUs: few passes over memory.

A GPU trains EfficientNets as fast as it reads and writes activations (`docs/gpu_bytes.md`). Left
to itself XLA writes float32 copies of bfloat16 activations between the passes of a norm, because a
sigmoid is dear to compute twice and rounding back and forth is dropped. Here every pass over an
activation is written down:

    forward    read x: statistics
               (with a gate: read x: the means of the activation over each image)
               read x, write y = gate * activation(norm(x))
    backward   (with a gate: read dy, y: the gradient of the gate)
               read dy, x: both sums
               read dy, x: write dx

Nothing but x and y and a few numbers per channel is kept for the backward pass; normalised values
and activations are computed again wherever they are needed, in float32, and are never written.
Barriers keep XLA from sharing them between passes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_SPACE = (-3, -2)  # rows and columns of [..., H, W, C]


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """What is computed; see `norm.BatchNorm`.

    Attributes:
        epsilon: added to the variance.
        groups: of consecutive examples with statistics of their own.
        axis_name: mesh axis whose devices share statistics; None: they do not.
        device_groups: devices that share them, None: all of the axis.
        activation: of the normalised values, elementwise; None: there is none.
        gate: (parameters, means [N, 1, 1, C] of the activation, in the compute type) -> factors
            [N, 1, 1, C]; None: there is none.
    """

    epsilon: float
    groups: int = 1
    axis_name: str | None = None
    device_groups: Any = None
    activation: Callable[[Array], Array] | None = None
    gate: Callable[[Any, Array], Array] | None = None

    def mean(self, *values: Array) -> tuple[Array, ...]:
        """Means over all but the group and the channel of [groups, n, H, W, C], float32."""
        return self.shared(tuple(jnp.mean(v, (1, 2, 3), keepdims=True) for v in values))

    def shared(self, means: tuple[Array, ...]) -> tuple[Array, ...]:
        """Means over the devices, in one message."""
        if self.axis_name is None:
            return means
        return lax.pmean(means, self.axis_name, axis_index_groups=self.device_groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm(
    how: Norm, x: Array, scale: Array, bias: Array, gate_params: Any
) -> tuple[Array, Array, Array]:
    """Normalises by the batch's own statistics, in training.

    Args:
        how: see `Norm`.
        x: [N, H, W, C], any float type.
        scale: [C] float32.
        bias: [C] float32.
        gate_params: of `how.gate`.

    Returns:
        gate * activation(norm(x)) [N, H, W, C], type of x, and mean and biased variance of each
        group, [groups, 1, 1, 1, C] float32, which have no gradient.
    """
    return _forward(how, x, scale, bias, gate_params)[0]


def _forward(
    how: Norm, x: Array, scale: Array, bias: Array, gate_params: Any
) -> tuple[tuple[Array, Array, Array], Any]:
    x = lax.optimization_barrier(x)
    grouped = _grouped(x, how.groups)
    mean, mean_square = how.mean(grouped, jnp.square(grouped))
    var = jnp.maximum(mean_square - jnp.square(mean), 0)
    statistics = (mean, lax.rsqrt(var + how.epsilon))
    gate, pull_gate = None, None
    if how.gate is not None:
        y, _ = _activated(how, grouped, statistics, scale, bias)
        pooled = jnp.mean(y, _SPACE, keepdims=True).reshape(-1, 1, 1, x.shape[-1])
        gate, pull_gate = jax.vjp(how.gate, gate_params, pooled.astype(x.dtype))
        x, gate = lax.optimization_barrier((x, gate))
        grouped = _grouped(x, how.groups)
    y, _ = _activated(how, grouped, statistics, scale, bias)
    if gate is not None:
        y = y * _grouped(gate, how.groups)
    y = y.reshape(x.shape).astype(x.dtype)
    kept = y if gate is not None else None  # by the convolution that follows, too
    return (y, mean, var), (x, kept, scale, bias, statistics, gate, pull_gate)


def _backward(
    how: Norm, residuals: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Any]:
    x, y, scale, bias, statistics, gate, pull_gate = residuals
    dy, x, y = lax.optimization_barrier((cotangents[0], x, y))

    def slopes() -> tuple[Array, Array]:
        """Gradient with respect to scale * normed + bias, and the normed x."""
        grouped = _grouped(x, how.groups)
        _, slope = _activated(how, grouped, statistics, scale, bias)
        dz = _grouped(dy, how.groups)
        if gate is not None:
            dz = dz * _grouped(gate, how.groups) + dmeans
        return dz * slope, _normed(grouped, statistics)

    dgate_params, dmeans = None, None
    if gate is not None:
        # From y = gate * activation, which needs no sigmoid. A gate of 0 has no gradient either.
        products = dy.astype(jnp.float32) * y.astype(jnp.float32)
        dgate = jnp.sum(products, _SPACE, keepdims=True) / jnp.where(gate == 0, jnp.inf, gate)
        dgate_params, dpooled = pull_gate(dgate.astype(gate.dtype))
        dmeans = _grouped(dpooled, how.groups) / (x.shape[1] * x.shape[2])
        dy, x, dmeans = lax.optimization_barrier((dy, x, dmeans))
    dz, normed = slopes()
    # Two real sums as one complex sum: with two reductions XLA writes the sigmoid that they share
    # to memory, in float32, and reads it back.
    sums = jnp.sum(lax.complex(dz, dz * normed), (1, 2, 3), keepdims=True)
    sums = (sums.real, sums.imag)
    dbias, dscale = (jnp.sum(v, (0, 1, 2, 3)) for v in sums)
    count = x.shape[0] // how.groups * x.shape[1] * x.shape[2]
    means = how.shared(tuple(v / count for v in sums))

    dy, x, means = lax.optimization_barrier((dy, x, means))
    dz, normed = slopes()
    dx = statistics[1] * scale * (dz - means[0] - normed * means[1])
    return dx.reshape(x.shape).astype(x.dtype), dscale, dbias, dgate_params


norm.defvjp(_forward, _backward)


def _grouped(x: Array, groups: int) -> Array:
    """[N, H, W, C] -> [groups, n, H, W, C] float32."""
    return x.reshape(groups, -1, *x.shape[1:]).astype(jnp.float32)


def _normed(x: Array, statistics: tuple[Array, Array]) -> Array:
    mean, factor = statistics
    return (x - mean) * factor


def _activated(
    how: Norm, x: Array, statistics: tuple[Array, Array], scale: Array, bias: Array
) -> tuple[Array, Array | float]:
    """The activation of the normalised x, and its slope with respect to scale * x + bias."""
    z = _normed(x, statistics) * scale + bias
    if how.activation is None:
        return z, 1.0
    y, pull = jax.vjp(how.activation, z)
    return y, pull(jnp.ones_like(z))[0]


def stored(x: Array) -> Array:
    """Returns x, and makes XLA write it once, in its own type, for all that read it."""
    return lax.optimization_barrier(x)
