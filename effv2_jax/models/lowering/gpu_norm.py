"""Batch normalisation, its activation and squeeze-and-excite for GPUs: few passes over memory.

A GPU trains EfficientNets as fast as it reads and writes activations (`docs/gpu_bytes.md`). Left
to itself XLA writes float32 copies of bfloat16 activations between the passes of a norm, because a
sigmoid is dear to compute twice and rounding back and forth is dropped. Here every pass over an
activation is written down:

    forward    read x: statistics
               (with a gate: read x: the means of the activation over each image)
               read x, write y = gate * activation(norm(x))
    backward   read dy, x: the sums (with a gate: for each image, and those of the gate's gradient)
               read dy, x: write dx

Nothing but x and a few numbers per channel is kept for the backward pass; normalised values and
activations are computed again wherever they are needed, in float32, and are never written.
Barriers keep XLA from sharing them between passes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering import gpu_sums

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

    def forward(self, x: Array, params: Any) -> tuple[tuple[Array, Any], Any]:
        """What `norm` gives, and keeps beside x; this and the next two as `remat.Between`."""
        (y, *moments), (_, *kept) = _forward(self, x, *params)
        return (y, tuple(moments)), kept

    def again(self, x: Array, kept: Any) -> Array:
        """The values of `norm` once more."""
        return _values(self, x, *kept[:-1])

    def backward(self, x: Array, kept: Any, gradient: Array) -> tuple[Array, Any]:
        """The gradients of x and of the parameters."""
        dx, *dparams = _backward(self, (x, *kept), (gradient, None, None))
        return dx, tuple(dparams)

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
    y = _values(how, x, scale, bias, statistics, gate)
    return (y, mean, var), (x, scale, bias, statistics, gate, pull_gate)


def _values(
    how: Norm,
    x: Array,
    scale: Array,
    bias: Array,
    statistics: tuple[Array, Array],
    gate: Array | None,
) -> Array:
    """Returns gate * activation(norm(x)), type and shape of x."""
    y, _ = _activated(how, _grouped(x, how.groups), statistics, scale, bias)
    if gate is not None:
        y = y * _grouped(gate, how.groups)
    return y.reshape(x.shape).astype(x.dtype)


def _backward(
    how: Norm, residuals: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Any]:
    x, scale, bias, statistics, gate, pull_gate = residuals
    dy, x = lax.optimization_barrier((cotangents[0], x))
    pixels = x.shape[1] * x.shape[2]
    dgate_params, dmeans = None, None
    if gate is not None:
        dgate, *of_images = _image_sums(how, dy, x, scale, bias, statistics)
        dgate_params, dpooled = pull_gate(dgate[:, None, None].astype(gate.dtype))
        gate, dmeans = _grouped(gate, how.groups), _grouped(dpooled, how.groups) / pixels
        # The gradient of the activation is dy * gate + dmeans: linear in both, so that its sums
        # need no other pass.
        dz, dz_normed, slope, slope_normed = (
            _grouped(v[:, None, None], how.groups) for v in of_images
        )
        sums = [gate * dz + dmeans * slope, gate * dz_normed + dmeans * slope_normed]
        sums = [jnp.sum(v, 1, keepdims=True) for v in sums]

    def slopes() -> tuple[Array, Array]:
        """Gradient with respect to scale * normed + bias, and the normed x."""
        grouped = _grouped(x, how.groups)
        _, slope = _activated(how, grouped, statistics, scale, bias)
        dz = _grouped(dy, how.groups)
        if gate is not None:
            dz = dz * gate + dmeans
        return dz * slope, _normed(grouped, statistics)

    if gate is None:
        dz, normed = slopes()
        # Two real sums as one complex sum: with two reductions XLA writes the sigmoid that they
        # share to memory, in float32, and reads it back.
        both = jnp.sum(lax.complex(dz, dz * normed), (1, 2, 3), keepdims=True)
        sums = [both.real, both.imag]
    dbias, dscale = (jnp.sum(v, (0, 1, 2, 3)) for v in sums)
    count = x.shape[0] // how.groups * pixels
    means = how.shared(tuple(v / count for v in sums))

    dy, x, means = lax.optimization_barrier((dy, x, means))
    dz, normed = slopes()
    dx = statistics[1] * scale * (dz - means[0] - normed * means[1])
    return dx.reshape(x.shape).astype(x.dtype), dscale, dbias, dgate_params


norm.defvjp(_forward, _backward)


def _grouped(x: Array, groups: int) -> Array:
    """[N, H, W, C] -> [groups, n, H, W, C] float32."""
    return x.reshape(groups, -1, *x.shape[1:]).astype(jnp.float32)


def _image_sums(
    how: Norm, dy: Array, x: Array, scale: Array, bias: Array, statistics: tuple[Array, Array]
) -> tuple[Array, ...]:
    """Sums over each image, [N, C]: dy * activation, dy * slope (* normed), slope (* normed)."""

    def terms(arrays: Sequence[Array], vectors: Sequence[Array]) -> tuple[Array, ...]:
        (dy, x), (mean, factor, scale, bias) = arrays, vectors
        y, slope = _activated(how, x, (mean, factor), scale, bias)
        normed = _normed(x, (mean, factor))
        dz = dy * slope
        return dy * y, dz, dz * normed, slope, slope * normed

    vectors = (*statistics, scale, bias)
    shape = (how.groups, x.shape[-1])
    vectors = [jnp.broadcast_to(v.reshape(-1, shape[1]), shape) for v in vectors]
    return gpu_sums.image_sums(terms, 5, (dy, x), vectors)


def _normed(x: Array, statistics: tuple[Array, Array]) -> Array:
    mean, factor = statistics
    return (x - mean) * factor


def _activated(
    how: Norm, x: Array, statistics: tuple[Array, Array], scale: Array, bias: Array
) -> tuple[Array, Array]:
    """The activation of the normalised x, and its slope with respect to scale * x + bias."""
    z = _normed(x, statistics) * scale + bias
    if how.activation is None:
        return z, jnp.ones_like(z)
    y, pull = jax.vjp(how.activation, z)
    return y, pull(jnp.ones_like(z))[0]


def stored(x: Array) -> Array:
    """Returns x, and makes XLA write it once, in its own type, for all that read it."""
    return lax.optimization_barrier(x)
