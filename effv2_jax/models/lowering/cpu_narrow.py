"""Convolutions on CPUs by the type of what is multiplied: bfloat16 by oneDNN, the rest as float32.

A kernel of bfloat16 says that numbers are multiplied as such, with sums of 32 bits, whatever the
type of x. Where oneDNN can (`cpu_onednn.is_available`), x and, in the backward pass, dy are rounded
to bfloat16 too. Elsewhere the kernel is widened to the type of x: the forms of `cpu_dense.py` and
`cpu_depthwise.py` are faster there than what XLA makes of numbers of 16 bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering import cpu_dense, cpu_depthwise, cpu_onednn, plain
from effv2_jax.models.lowering.geometry import Geometry
from effv2_jax.models.lowering.windows import as_rows, materialize, pad_image, rounded

_PATCHES = 2304  # of outputs whose inputs are put side by side at a time
_FEW_ROWS = 32  # fewer are multiplied in less time than oneDNN takes to begin


def is_narrow(dtype: jnp.dtype) -> bool:
    """Whether numbers of that type are multiplied as such here."""
    return dtype == jnp.bfloat16 and cpu_onednn.is_available()


def map_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type of maps: float32 for all of 16 bits, since nothing but products is fast in these."""
    return jnp.promote_types(dtype, jnp.float32)


def result_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type of what convolutions give in inference.

    It passes through memory to the norm, where it is widened. A backward pass would ask for both.
    """
    return dtype if is_narrow(dtype) else map_type(dtype)


def pointwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """1x1 convolution: x [N, H, W, C], kernel [1, 1, C, O] -> [N, H, W, O]."""
    if not _is_narrow(x, kernel):
        return cpu_dense.pointwise(x, kernel, geometry)
    if len(as_rows(x)) < _FEW_ROWS:
        return cpu_dense.pointwise(x.astype(jnp.float32), kernel, geometry).astype(x.dtype)
    return _dense(x, kernel, geometry)


def dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Dense convolution of x [N, H, W, C] with kernel [k, k, C, O]: [N, H', W', O]."""
    narrow = _is_narrow(x, kernel) and cpu_dense.has_own_form(geometry)
    return (_dense if narrow else cpu_dense.dense)(x, kernel, geometry)


def depthwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Depthwise convolution of x [N, H, W, C] with kernel [k, k, 1, C]: [N, H', W', C]."""
    narrow = _is_narrow(x, kernel) and geometry.has_own_forms
    return (_depthwise if narrow else cpu_depthwise.depthwise)(x, kernel, geometry)


def _is_narrow(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether these are multiplied as bfloat16."""
    return is_narrow(min(x.dtype, kernel.dtype, key=lambda dtype: dtype.itemsize))


def _round(x: jax.Array) -> jax.Array:
    return rounded(x, jnp.bfloat16)


def _convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry, *, groups: int = 1) -> jax.Array:
    dtype = x.dtype if x.dtype == jnp.bfloat16 else jnp.float32
    y = cpu_onednn.convolve(_round(x), _round(kernel), geometry, groups=groups, dtype=dtype)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return _convolve(x, kernel, geometry)


def _dense_forward(
    x: jax.Array, kernel: jax.Array, geometry: Geometry
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense(x, kernel, geometry), (_round(x), kernel)


def _dense_backward(
    geometry: Geometry, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    dy = materialize(dy)
    if geometry.strides == (1, 1):
        backward = kernel[::-1, ::-1].swapaxes(2, 3)
        dx = _dense(dy, backward, geometry.of_input_gradient)
    else:
        dx = cpu_dense.input_gradient_by_phases(dy, kernel, geometry, _dense)
    return dx, _kernel_gradient(x, _round(dy), geometry).astype(kernel.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """Gradient of the kernel, [k, k, C, O] float32, of x and dy of bfloat16."""
    if geometry.is_pointwise:
        return cpu_onednn.outer_sum(as_rows(x), as_rows(dy))[None, None]

    def outer_sum_of(dy: jax.Array, patches: jax.Array) -> jax.Array:
        return cpu_onednn.outer_sum(as_rows(_floats(dy)), as_rows(_floats(patches)))

    return cpu_dense.sum_over_bands(_bits(x), _bits(dy), geometry, outer_sum_of, pixels=_PATCHES)


def _kernel_gradient_forward(
    x: jax.Array, dy: jax.Array, geometry: Geometry
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _kernel_gradient(x, dy, geometry), (x, dy)


def _kernel_gradient_backward(
    geometry: Geometry, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # It is asked for by gradients of gradients alone.
    def plainly(x: jax.Array, dy: jax.Array) -> jax.Array:
        kernel = jnp.zeros_like(cotangent)
        _, pull_back = jax.vjp(lambda kernel: plain.dense(x, kernel, geometry), kernel)
        return pull_back(dy)[0]

    _, pull_back = jax.vjp(plainly, *(v.astype(cotangent.dtype) for v in operands))
    return tuple(v.astype(jnp.bfloat16) for v in pull_back(cotangent))


_kernel_gradient.defvjp(_kernel_gradient_forward, _kernel_gradient_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return _convolve(x, kernel, geometry, groups=x.shape[3])


def _depthwise_forward(
    x: jax.Array, kernel: jax.Array, geometry: Geometry
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _depthwise(x, kernel, geometry), (_round(x), kernel)


def _depthwise_backward(
    geometry: Geometry, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    dy = materialize(dy)
    if geometry.strides == (1, 1):
        dx = _depthwise(dy, kernel[::-1, ::-1], geometry.of_input_gradient)
    else:
        dx = cpu_depthwise.input_gradient(dy, kernel, geometry)
    padded = pad_image(x, geometry.padding)
    gradient = cpu_depthwise.kernel_gradient(padded, _round(dy), geometry)
    return dx, gradient.reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _bits(x: jax.Array) -> jax.Array:
    """16-bit numbers as integers, which XLA moves as they are; floats it would widen first."""
    return lax.bitcast_convert_type(x, jnp.uint16)


def _floats(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16)
