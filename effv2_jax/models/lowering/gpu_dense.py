"""Dense convolution for GPUs: the gradient of the input adds what flows through the shortcut.

cuDNN's forward convolution can add another array to its output, its convolution for gradients
cannot. At stride 1 the gradient of the input is itself a forward convolution, with the kernel
turned round; written so, the sum at the start of a block with a shortcut costs no pass of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering import plain
from effv2_jax.models.lowering.geometry import Geometry


def dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Dense convolution of x [N, H, W, C] with kernel [k, k, C, O]: [N, H', W', O]."""
    if geometry.strides != (1, 1) or not geometry.has_own_forms:
        return plain.dense(x, kernel, geometry)
    return _convolve(x, kernel, geometry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return plain.dense(x, kernel, geometry)


def _forward(
    x: jax.Array, kernel: jax.Array, geometry: Geometry
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return plain.dense(x, kernel, geometry), (x, kernel)


def _backward(
    geometry: Geometry, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    turned = jnp.flip(kernel.astype(dy.dtype), (0, 1)).swapaxes(2, 3)
    axes = (geometry.rows, geometry.columns)
    dx = lax.conv_general_dilated(
        dy,
        lax.optimization_barrier(turned),  # else XLA finds the gradient in it
        (1, 1),
        [(axis.kernel - 1 - axis.low, axis.kernel - 1 - axis.high) for axis in axes],
        dimension_numbers=plain.NHWC,
    )
    _, pull = jax.vjp(lambda k: plain.dense(x, k, geometry), kernel)
    return dx, *pull(dy)


_convolve.defvjp(_forward, _backward)
