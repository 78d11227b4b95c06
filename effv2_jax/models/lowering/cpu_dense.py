"""Dense and 1x1 convolutions for XLA's CPU backend: matrix products where they are faster.

XLA runs convolutions forward, and their input gradients at stride 1, near the speed of its matrix
product. The exceptions, measured in `docs/cpu_forms.md`, are what this file is about: 1x1
convolutions, the input gradient at stride 2, and the gradient of the kernel. At stride 1
`cpu_winograd.py` is faster still where there are enough channels.

A kernel of 16-bit numbers says that numbers are multiplied as such, with sums of 32 bits, whatever
the type of x: processors with instructions for that (AMX, AVX-512 BF16) make several times as many
products as of float32. XLA's CPU backend uses them for products of two matrices as they are in
memory, and widens the numbers first for whatever else it is asked: convolutions, transposed
matrices, sums of 16 bits, copies. So here convolutions become such products.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering import cpu_winograd, plain
from effv2_jax.models.lowering.bands import Bands
from effv2_jax.models.lowering.geometry import Axis, Geometry
from effv2_jax.models.lowering.windows import interleave, materialize, rounded, sum_type

_CHUNK = 256  # rows per product of `outer_sum`'s batched form
_FEW_ROWS = 200  # a sum over fewer takes less time than the transposition of its result
_PATCHES = 512  # of outputs whose inputs are put side by side at a time
# The same for 16-bit values; and from how many filters on that is faster than float32.
_NARROW_PATCHES = 2304
_MANY_FILTERS = 64
# Pixels: from how many on the narrower side comes first, and from how many on float32 is faster.
_TURN_PIXELS, _MANY_PIXELS = 1024, 4096


def pointwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """1x1 convolution: x [N, H, W, C], kernel [1, 1, C, O] -> [N, H, W, O]."""
    del geometry
    return _pointwise(x, kernel)


def dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Dense convolution of x [N, H, W, C] with kernel [k, k, C, O]: [N, H', W', O]."""
    if not geometry.has_own_forms or geometry.rows.kernel < 2 or geometry.columns.kernel < 2:
        return plain.dense(x, kernel, geometry)
    return _dense(x, kernel, geometry)


@jax.custom_vjp
def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _pointwise_forward(x, kernel)[0]


def _pointwise_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    narrow = _product_type(x, kernel)
    narrow_x = rounded(x, narrow)
    y = _product(narrow_x, kernel[0, 0].astype(narrow), 0, x.dtype)
    return y, (narrow_x, kernel)


def _pointwise_backward(
    residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    narrow_dy = rounded(materialize(dy), x.dtype)
    dx = _product(narrow_dy, kernel[0, 0].astype(x.dtype), 1, dy.dtype)
    gradient = _kernel_gradient_1x1(x, narrow_dy)
    return dx, gradient.reshape(kernel.shape).astype(kernel.dtype)


def _product_type(x: jax.Array, kernel: jax.Array) -> jnp.dtype:
    """The narrower type, in which numbers are multiplied: sums are float32 or wider."""
    return min(x.dtype, kernel.dtype, key=lambda dtype: dtype.itemsize)


def _product(x: jax.Array, weights: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
    """X [N, H, W, C] times weights, whose axis has C, too: [N, H, W, O] of that type."""
    y = _dot(_pixels(x), weights, ((1,), (axis,)))
    return y.astype(dtype).reshape(*x.shape[:3], weights.shape[1 - axis])


def _kernel_gradient_1x1(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Sum over the pixels of x [N, H, W, C] and dy [N, H, W, O] of their outer products: [C, O]."""
    pixels = math.prod(x.shape[:3])
    if x.dtype.itemsize > 2 or pixels >= _MANY_PIXELS:
        return outer_sum(_pixels(x), _pixels(dy))
    if x.shape[3] > dy.shape[3] and pixels >= _TURN_PIXELS:
        return _outer_sum_narrow(dy, x).T
    return _outer_sum_narrow(x, dy)


def _outer_sum_narrow(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Sum over the pixels of x [N, H, W, C] and dy [N, H, W, O], 16-bit numbers: [C, O] float32."""
    # For a sum over several axes XLA copies x transposed and multiplies 16-bit numbers; for one
    # over the first of two axes it widens them.
    return _dot(x, dy, ((0, 1, 2), (0, 1, 2)))


def _dot(x: jax.Array, y: jax.Array, axes: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
    """Sum over these axes of x and of y; its type is float32 or wider."""
    total = lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=sum_type(x))
    # Materialised: where the result is transposed, XLA turns the product around after it has chosen
    # one of 16-bit numbers, and has none for what then is to be multiplied.
    return materialize(total) if x.dtype.itemsize == 2 else total


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    # XLA's fast convolution takes channels in fours; the stem's three cost up to eight times as
    # much as four, of which one is zero.
    missing = -x.shape[3] % 4
    if missing:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0)))
    if _product_type(x, kernel).itemsize == 2 and kernel.shape[3] >= _MANY_FILTERS:
        return _by_patches(x, kernel, geometry)
    if cpu_winograd.is_faster(x, kernel.shape, geometry):
        return cpu_winograd.convolve(x, kernel.astype(x.dtype), geometry)
    return plain.dense(x, kernel, geometry)


def _dense_forward(
    x: jax.Array, kernel: jax.Array, geometry: Geometry
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense(x, kernel, geometry), (rounded(x, _product_type(x, kernel)), kernel)


def _dense_backward(
    geometry: Geometry, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    if geometry.strides == (1, 1):
        # Materialised, or Winograd's form transposes, which is slow, once for each of its points.
        backward = materialize(kernel[::-1, ::-1].swapaxes(2, 3))
        dx = _dense(dy, backward, geometry.of_input_gradient)
    elif kernel.shape[2] < 32:
        dx = _input_gradient_by_phases(dy, kernel, geometry)
    else:
        dx = _plain_input_gradient(x.astype(dy.dtype), kernel, geometry, dy)
    return dx, _kernel_gradient(x, dy, kernel, geometry).astype(kernel.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


def _plain_input_gradient(
    x: jax.Array, kernel: jax.Array, geometry: Geometry, dy: jax.Array
) -> jax.Array:
    """XLA's own gradient with respect to the input."""
    _, pull_back = jax.vjp(lambda x: plain.dense(x, kernel, geometry), x)
    return pull_back(dy)[0]


def _input_gradient_by_phases(dy: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A small convolution for each of the phases of the input, instead of one over dilated dy.

    Faster where the input has few channels; with more of them XLA's own is equally fast.
    """
    rows, columns = geometry.rows, geometry.columns
    backward = kernel.astype(dy.dtype).swapaxes(2, 3)  # [k, k, O, C]
    phases = []
    for row_phase in range(rows.stride):
        for column_phase in range(columns.stride):
            down, i = _phase_window(rows, row_phase)
            right, j = _phase_window(columns, column_phase)
            phases.append(
                lax.conv_general_dilated(
                    dy,
                    backward[i, j],
                    (1, 1),
                    (down, right),
                    dimension_numbers=plain.NHWC,
                )
            )
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


def _kernel_gradient(
    x: jax.Array, dy: jax.Array, kernel: jax.Array, geometry: Geometry
) -> jax.Array:
    """Gradient of the kernel, [k, k, C, O], by the form that is fastest for the type and shape."""
    narrow = _product_type(x, kernel)
    if narrow.itemsize == 2:
        return _narrow_kernel_gradient(rounded(x, narrow), rounded(dy, narrow), geometry)
    if cpu_winograd.applies(x, geometry):
        return cpu_winograd.kernel_gradient(x, dy, geometry)
    return _sum_over_bands(x, dy, geometry, _pixels_outer_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """`_kernel_gradient` of x and dy of 16-bit numbers."""

    def outer_sum_of_bits(dy: jax.Array, patches: jax.Array) -> jax.Array:
        return _outer_sum_narrow(_floats(dy, x), _floats(patches, x))

    return _sum_over_bands(_bits(x), _bits(dy), geometry, outer_sum_of_bits)


def _narrow_kernel_gradient_forward(
    x: jax.Array, dy: jax.Array, geometry: Geometry
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow_kernel_gradient(x, dy, geometry), (x, dy)


def _narrow_kernel_gradient_backward(
    geometry: Geometry, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Integers have no gradient. It is asked for by gradients of gradients alone.
    def plainly(x: jax.Array, dy: jax.Array) -> jax.Array:
        kernel = jnp.zeros_like(cotangent)
        _, pull_back = jax.vjp(lambda kernel: plain.dense(x, kernel, geometry), kernel)
        return pull_back(dy)[0]

    _, pull_back = jax.vjp(plainly, *(v.astype(cotangent.dtype) for v in operands))
    return tuple(v.astype(operands[0].dtype) for v in pull_back(cotangent))


_narrow_kernel_gradient.defvjp(_narrow_kernel_gradient_forward, _narrow_kernel_gradient_backward)


def _sum_over_bands(
    x: jax.Array,
    dy: jax.Array,
    geometry: Geometry,
    outer_sum_of: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Products of dy and the patches of the input that its pixels see, a few pixels at a time.

    Args:
        x: [N, H, W, C].
        dy: [N, H', W', O].
        geometry: of the convolution.
        outer_sum_of: gives the [O, k * k * C] of dy and patches.

    Returns:
        [k, k, C, O].
    """
    bands = Bands(x.shape[0], geometry, pixels=_PATCHES)
    padded, padded_dy = bands.pad_input(x), bands.pad_output(dy)

    def add_band(band: jax.Array, total: jax.Array) -> jax.Array:
        patches = _patches(bands.input(padded, band), bands, geometry)
        return total + outer_sum_of(bands.output(padded_dy, band), patches)

    shape = (geometry.rows.kernel, geometry.columns.kernel, x.shape[3], dy.shape[3])
    start = jnp.zeros((dy.shape[3], math.prod(shape[:3])), sum_type(x))
    return lax.fori_loop(0, bands.count, add_band, start).T.reshape(shape)


def _pixels_outer_sum(dy: jax.Array, patches: jax.Array) -> jax.Array:
    return _dot(_pixels(dy), _pixels(patches), ((0,), (0,)))


def _by_patches(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A convolution as a product of 16-bit numbers: what each pixel sees, times the kernel."""
    narrow = _product_type(x, kernel)
    bands = Bands(x.shape[0], geometry, pixels=_NARROW_PATCHES, overlap=True)
    padded = bands.pad_input(_bits(rounded(x, narrow)))
    weights = kernel.astype(narrow).reshape(-1, kernel.shape[3])

    def outputs(band: jax.Array) -> jax.Array:
        patches = _patches(bands.input(padded, band), bands, geometry)
        return _product(_floats(patches, weights), weights, 0, x.dtype)

    def write_band(band: jax.Array, y: jax.Array) -> jax.Array:
        return bands.write(y, outputs(band), band)

    if bands.count == 1:
        return outputs(0)
    shape = (x.shape[0], geometry.rows.out, geometry.columns.out, kernel.shape[3])
    return lax.fori_loop(0, bands.count, write_band, jnp.zeros(shape, x.dtype))


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


def _bits(x: jax.Array) -> jax.Array:
    """16-bit numbers as integers, which XLA moves as they are; floats it would widen first."""
    return lax.bitcast_convert_type(x, jnp.uint16)


def _floats(bits: jax.Array, like: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, like.dtype)


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


def _pixels(x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N * H * W, C]."""
    return x.reshape(-1, x.shape[3])
