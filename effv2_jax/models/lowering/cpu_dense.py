"""Dense and 1x1 convolutions for XLA's CPU backend: matrix products where they are faster.

XLA runs convolutions forward, and their input gradients at stride 1, near the speed of its matrix
product. The exceptions, measured in `docs/performance.md`, are what this file is about: 1x1
convolutions, the input gradient at stride 2, and the gradient of the kernel. At stride 1
`cpu_winograd.py` is faster still where there are enough channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering import cpu_winograd, plain
from effv2_jax.models.lowering.geometry import Axis, Geometry
from effv2_jax.models.lowering.windows import interleave, materialize, pad_image, sum_type, window

_CHUNK = 256  # rows per product of `outer_sum`'s batched form
_FEW_ROWS = 200  # a sum over fewer takes less time than the transposition of its result
# Images together in the other gradients of a kernel: the first that have no more pixels, or the
# last. They stand in the place of channels, which XLA's fast convolution takes in fours.
_IMAGES, _PIXELS = (8, 4, 2), 2**17


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
    pixels = _pixels(x)
    return (pixels @ kernel[0, 0].astype(x.dtype)).reshape(*x.shape[:3], kernel.shape[3])


def _pointwise_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _pointwise(x, kernel), (x, kernel)


def _pointwise_backward(
    residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    dy = materialize(dy)
    dx = (_pixels(dy) @ kernel[0, 0].astype(dy.dtype).T).reshape(x.shape)
    gradient = outer_sum(_pixels(x), _pixels(dy))
    return dx, gradient.reshape(kernel.shape).astype(kernel.dtype)


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
        dx = _input_gradient_by_phases(dy, kernel, geometry)
    else:
        dx = _plain_gradient(x, kernel, geometry, dy, of=0)
    return dx, _kernel_gradient(x, dy, kernel, geometry).astype(kernel.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


def _plain_gradient(
    x: jax.Array, kernel: jax.Array, geometry: Geometry, dy: jax.Array, *, of: int
) -> jax.Array:
    """XLA's own gradient with respect to the input (of=0) or the kernel (of=1)."""
    _, pull_back = jax.vjp(functools.partial(plain.dense, geometry=geometry), x, kernel)
    return pull_back(dy)[of]


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
    """Gradient of the kernel, [k, k, C, O], by the form that is fastest for the shape."""
    channels, filters = kernel.shape[2:]
    if cpu_winograd.is_gradient_faster(x, kernel.shape, geometry):
        return cpu_winograd.kernel_gradient(x, dy, geometry)
    if geometry.strides == (1, 1):
        form = _kernel_gradient_by_swapping
    elif filters <= 32 or channels <= 16:
        form = _kernel_gradient_by_xla
    else:
        form = _kernel_gradient_by_taps
    # These take more time per image the more images there are, as they leave the caches. Unrolled,
    # since XLA's fast convolution does not take their shapes inside a loop.
    few = next(n for n in _IMAGES if n * x.shape[1] * x.shape[2] <= _PIXELS or n == _IMAGES[-1])
    parts = [slice(start, start + few) for start in range(0, x.shape[0], few)]
    return functools.reduce(jnp.add, (form(x[part], dy[part], kernel, geometry) for part in parts))


def _kernel_gradient_by_xla(
    x: jax.Array, dy: jax.Array, kernel: jax.Array, geometry: Geometry
) -> jax.Array:
    return _plain_gradient(x, kernel, geometry, dy, of=1)


def _kernel_gradient_by_swapping(
    x: jax.Array, dy: jax.Array, kernel: jax.Array, geometry: Geometry
) -> jax.Array:
    """The convolution of dy with x as its kernel, channels in the place of the examples; stride 1.

    XLA's own gradient convolves x with dy: the same sum with the two in each other's place, equally
    fast or up to 1.7 times slower, depending on which of them has how many channels.
    """
    reversed_taps = lax.conv_general_dilated(
        dy,
        x,
        (1, 1),
        geometry.of_input_gradient.padding,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=sum_type(x),
    )  # [k, k, O, C]
    return reversed_taps[::-1, ::-1].swapaxes(2, 3)


def _kernel_gradient_by_taps(
    x: jax.Array, dy: jax.Array, kernel: jax.Array, geometry: Geometry
) -> jax.Array:
    """A matrix product for every tap: its window of the input against dy."""
    padded = pad_image(x, geometry.padding)
    pixels = _pixels(dy)
    gradient = [
        outer_sum(_pixels(window(padded, geometry, i, j)), pixels)
        for i in range(geometry.rows.kernel)
        for j in range(geometry.columns.kernel)
    ]
    return jnp.stack(gradient).reshape(kernel.shape)


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
