"""Dense and 1x1 convolutions for XLA's CPU backend: matrix products where they are faster.

XLA runs convolutions forward, and their input gradients at stride 1, near the speed of its matrix
product. The exceptions, measured in `docs/cpu_forms.md`, are what this file is about: 1x1
convolutions, the input gradient at stride 2, and the gradient of the kernel. At stride 1
`cpu_winograd.py` is faster still where there are enough channels.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering import cpu_winograd, plain
from effv2_jax.models.lowering.bands import Bands
from effv2_jax.models.lowering.geometry import Axis, Form, Geometry
from effv2_jax.models.lowering.windows import as_rows, interleave, materialize, sum_type

_CHUNK = 256  # rows per product of `outer_sum`'s batched form
_FEW_ROWS = 200  # a sum over fewer takes less time than the transposition of its result
_PATCHES = 512  # of outputs whose inputs are put side by side at a time


def pointwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """1x1 convolution: x [N, H, W, C], kernel [1, 1, C, O] -> [N, H, W, O]."""
    del geometry
    return _pointwise(x, kernel)


def dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Dense convolution of x [N, H, W, C] with kernel [k, k, C, O]: [N, H', W', O]."""
    return (_dense if has_own_form(geometry) else plain.dense)(x, kernel, geometry)


def has_own_form(geometry: Geometry) -> bool:
    """Whether a dense convolution has another form here than XLA's."""
    return geometry.has_own_forms and min(geometry.rows.kernel, geometry.columns.kernel) > 1


@jax.custom_vjp
def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _product(x, kernel, 0)


def _pointwise_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _pointwise(x, kernel), (x, kernel)


def _pointwise_backward(
    residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    dy = materialize(dy)
    gradient = outer_sum(as_rows(x), as_rows(dy))
    return _product(dy, kernel, 1), gradient.reshape(kernel.shape).astype(kernel.dtype)


def _product(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """X [N, H, W, C] times kernel [1, 1, ., .], of whose last two this axis has C, too."""
    weights = kernel[0, 0].astype(x.dtype)
    y = _dot(as_rows(x), weights, ((1,), (axis,)))
    return y.astype(x.dtype).reshape(*x.shape[:3], -1)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
    """Sum over these axes of x and of y; its type is float32 or wider."""
    return lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=sum_type(x))


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    # XLA's fast convolution takes channels in fours; the stem's three cost up to eight times as
    # much as four, of which one is zero.
    missing = -x.shape[3] % 4
    if missing:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0)))
    if cpu_winograd.is_faster(x, kernel.shape, geometry):
        return cpu_winograd.convolve(x, kernel.astype(x.dtype), geometry)
    return plain.dense(x, kernel, geometry)


def _dense_forward(
    x: jax.Array, kernel: jax.Array, geometry: Geometry
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense(x, kernel, geometry), (x, kernel)


def _dense_backward(
    geometry: Geometry, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    if geometry.strides == (1, 1):
        # Materialised, or Winograd's form transposes, which is slow, once for each of its points.
        backward = materialize(kernel[::-1, ::-1].swapaxes(2, 3))
        dx = _dense(dy, backward, geometry.of_input_gradient)
    elif kernel.shape[2] < 32:
        dx = input_gradient_by_phases(dy, kernel, geometry, plain.dense)
    else:
        dx = _plain_input_gradient(x, kernel, geometry, dy)
    return dx, _kernel_gradient(x, dy, geometry).astype(kernel.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


def _plain_input_gradient(
    x: jax.Array, kernel: jax.Array, geometry: Geometry, dy: jax.Array
) -> jax.Array:
    """XLA's own gradient with respect to the input."""
    _, pull_back = jax.vjp(lambda x: plain.dense(x, kernel, geometry), x)
    return pull_back(dy)[0]


def input_gradient_by_phases(
    dy: jax.Array, kernel: jax.Array, geometry: Geometry, convolve: Form
) -> jax.Array:
    """A small convolution for each of the phases of the input, instead of one over dilated dy.

    Faster where the input has few channels; with more of them XLA's own is equally fast.

    Args:
        dy: [N, H', W', O].
        kernel: [k, k, C, O].
        geometry: of the convolution whose gradient it is.
        convolve: a form of the small convolutions, dense and of stride 1.

    Returns:
        [N, H, W, C].
    """
    rows, columns = geometry.rows, geometry.columns
    backward = kernel.swapaxes(2, 3)  # [k, k, O, C]
    phases = []
    for row_phase in range(rows.stride):
        for column_phase in range(columns.stride):
            down, i = _phase_window(rows, row_phase)
            right, j = _phase_window(columns, column_phase)
            taps = backward[i, j]
            axes = (
                Axis(axis.out, taps.shape[side], 1, *window)
                for side, (axis, window) in enumerate(((rows, down), (columns, right)))
            )
            phases.append(convolve(dy, taps, Geometry(*axes)))
    return interleave(phases, geometry)


def _phase_window(axis: Axis, phase: int) -> tuple[tuple[int, int], slice]:
    """Padding of dy and taps, in the order of the gradient's convolution, of one phase.

    Neighbouring taps of a phase are `stride` apart and reach neighbouring outputs, the later tap
    the earlier output.
    """
    taps = axis.taps_of_phase(phase)
    (first, last_offset), (last, first_offset) = taps[0], taps[-1]
    stop = first - axis.stride
    reversed_taps = slice(last, stop if stop >= 0 else None, -axis.stride)
    return (-first_offset, last_offset + axis.phase_length - axis.out), reversed_taps


def _kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """Gradient of the kernel, [k, k, C, O], by the form that is fastest for the shape."""
    if cpu_winograd.applies(x, geometry):
        return cpu_winograd.kernel_gradient(x, dy, geometry)
    return sum_over_bands(x, dy, geometry, _pixels_outer_sum, pixels=_PATCHES)


def sum_over_bands(
    x: jax.Array,
    dy: jax.Array,
    geometry: Geometry,
    outer_sum_of: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    pixels: int,
) -> jax.Array:
    """Products of dy and the patches of the input that its pixels see, a few pixels at a time.

    Args:
        x: [N, H, W, C].
        dy: [N, H', W', O].
        geometry: of the convolution.
        outer_sum_of: gives the [O, k * k * C] of dy and patches.
        pixels: of dy that are taken at a time, about.

    Returns:
        [k, k, C, O].
    """
    bands = Bands(x.shape[0], geometry, pixels=pixels)
    padded, padded_dy = bands.pad_input(x), bands.pad_output(dy)

    def add_band(band: jax.Array, total: jax.Array) -> jax.Array:
        patches = _patches(bands.input(padded, band), bands, geometry)
        return total + outer_sum_of(bands.output(padded_dy, band), patches)

    shape = (geometry.rows.kernel, geometry.columns.kernel, x.shape[3], dy.shape[3])
    start = jnp.zeros((dy.shape[3], math.prod(shape[:3])), sum_type(x))
    return lax.fori_loop(0, bands.count, add_band, start).T.reshape(shape)


def _pixels_outer_sum(dy: jax.Array, patches: jax.Array) -> jax.Array:
    return _dot(as_rows(dy), as_rows(patches), ((0,), (0,)))


def _patches(seen: jax.Array, bands: Bands, geometry: Geometry) -> jax.Array:
    """The inputs of each output of a band side by side: [images, rows, columns, k * k * C]."""
    rows, columns = geometry.rows, geometry.columns
    height = rows.stride * (bands.rows - 1) + 1
    width = columns.stride * (bands.columns - 1) + 1
    windows = [
        seen[:, i : i + height : rows.stride, j : j + width : columns.stride]
        for i in range(rows.kernel)
        for j in range(columns.kernel)
    ]
    return lax.optimization_barrier(jnp.concatenate(windows, 3))


def outer_sum(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Sum over the rows of x [rows, C] and dy [rows, O] of their outer products.

    The product contracts the long axis of both operands, which XLA's fast matrix product does not
    take; the general one that is left likes the operand with fewer columns first, and short
    products where it has few.

    Returns:
        [C, O], float32 or wider.
    """
    rows, channels = x.shape
    filters = dy.shape[1]
    if channels > filters and rows >= _FEW_ROWS:
        # Materialised, or XLA folds the transposition back into the product.
        return materialize(outer_sum(dy, x)).T
    wide = sum_type(x)
    if channels <= 96 and rows >= 4096 and rows % _CHUNK == 0:
        parts = lax.dot_general(  # a batch of short products that stay in the cache
            x.reshape(-1, _CHUNK, channels),
            dy.reshape(-1, _CHUNK, filters),
            (((1,), (1,)), ((0,), (0,))),
            preferred_element_type=wide,
        )
        return parts.sum(0)
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=wide)
