"""3x3 convolutions at stride 1 with 36 products for every 4x4 outputs instead of 144.

Winograd's F(4x4, 3x3), as Lavin and Gray wrote it down for networks (arXiv:1509.09308): an output
tile is A^T [(G g G^T) * (B^T d B)] A, with d the 6x6 inputs that it sees. Sums over channels are
made between the transformations, so they are 36 matrix products for a few rows of tiles.

The matrices evaluate polynomials at a few points. At 0, +-1/sqrt(2) and +-sqrt(2), whose powers
are balanced, results round two or three times as much as the direct convolution's; at those of the
paper, 0, +-1 and +-2, twice as much again (Barabasz et al., arXiv:1803.10986, look for points).

The tiles are 2.25 times the input and the output in size. A few rows of an image at a time stay in
the caches, where writing and reading them costs less than is saved unless the channels are few.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering.bands import Bands
from effv2_jax.models.lowering.geometry import Geometry

_TILE = 4  # outputs of a tile along each axis
_POINTS = _TILE + 2  # inputs of a tile along each axis, and products
# Tiles at a time, measured: enough for a matrix product, of rows of it or terms of its sums, and as
# few as the caches hold.
_CONVOLUTION_TILES = 36
_GRADIENT_TILES = 72
_ROOT = math.sqrt(2)


def applies(x: jax.Array, geometry: Geometry) -> bool:
    """Whether the forms here can be used, and for the gradient of the kernel are the fastest."""
    return (
        x.dtype == jnp.float32  # narrower types would round the transformed values
        and geometry.strides == (1, 1)
        and all(axis.kernel == 3 and axis.out >= 7 for axis in (geometry.rows, geometry.columns))
    )


def is_faster(x: jax.Array, kernel_shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether `convolve` is faster than XLA's convolution (measured in `docs/cpu_forms.md`).

    With 24 channels and filters it is not, with 32 and 32 it is.
    """
    return applies(x, geometry) and kernel_shape[2] * kernel_shape[3] >= 1024


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution of x [N, H, W, C] with kernel [3, 3, C, O] at stride 1: [N, H', W', O]."""
    transformed = _along(_along(kernel, 0, _kernel_points), 1, _kernel_points)
    transformed = transformed.reshape(_POINTS**2, *kernel.shape[2:])
    pixels = _CONVOLUTION_TILES * _TILE**2
    bands = Bands(x.shape[0], geometry, pixels=pixels, unit=_TILE, overlap=True)
    padded = bands.pad_input(x)

    def add_band(i: jax.Array, y: jax.Array) -> jax.Array:
        products = lax.dot_general(
            _input_tiles(bands.input(padded, i)), transformed, (((2,), (1,)), ((0,), (0,)))
        )
        return bands.write(y, _outputs(products, bands), i)

    y = jnp.zeros((x.shape[0], geometry.rows.out, geometry.columns.out, kernel.shape[3]), x.dtype)
    return lax.fori_loop(0, bands.count, add_band, y)


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """Gradient of `convolve` with respect to its kernel, from dy [N, H', W', O]: [3, 3, C, O]."""
    bands = Bands(x.shape[0], geometry, pixels=_GRADIENT_TILES * _TILE**2, unit=_TILE)
    padded, padded_dy = bands.pad_input(x), bands.pad_output(dy)

    def add_band(i: jax.Array, total: jax.Array) -> jax.Array:
        tiles = _input_tiles(bands.input(padded, i))
        gradients = _gradient_tiles(bands.output(padded_dy, i))
        return total + lax.dot_general(tiles, gradients, (((1,), (1,)), ((0,), (0,))))

    channels, filters = x.shape[3], dy.shape[3]
    start = jnp.zeros((_POINTS**2, channels, filters), x.dtype)
    total = lax.fori_loop(0, bands.count, add_band, start)
    total = total.reshape(_POINTS, _POINTS, channels, filters)
    return _along(_along(total, 0, _kernel_taps), 1, _kernel_taps)


def _input_tiles(images: jax.Array) -> jax.Array:
    """B^T d B of every tile: images [n, 4 * rows + 2, 4 * columns + 2, C] -> [36, tiles, C]."""
    height, width = (size - _POINTS + 1 for size in images.shape[1:3])
    # Stored, or XLA computes each line again for every value that it is part of.
    lines = lax.optimization_barrier(
        jnp.stack(_input_points(*(images[:, i : i + height : _TILE] for i in range(_POINTS))))
    )
    tiles = _input_points(*(lines[..., j : j + width : _TILE, :] for j in range(_POINTS)))
    return jnp.stack(tiles, 1).reshape(_POINTS**2, -1, images.shape[3])


def _outputs(products: jax.Array, bands: Bands) -> jax.Array:
    """A^T m A of every tile, put together: [36, tiles, O] -> [n, 4 * rows, 4 * columns, O]."""
    rows, columns = bands.rows // _TILE, bands.columns // _TILE
    products = products.reshape(_POINTS, _POINTS, -1, rows, columns, products.shape[2])
    lines = lax.optimization_barrier(jnp.stack(_output_values(*products), 3))
    images = jnp.stack(_output_values(*lines), 4)  # [n, rows, 4, columns, 4, O]
    return images.reshape(-1, _TILE * rows, _TILE * columns, images.shape[5])


def _gradient_tiles(dy: jax.Array) -> jax.Array:
    """A dy A^T of every tile, the transpose of `_outputs`: [n, 4r, 4c, O] -> [36, tiles, O]."""
    lines = lax.optimization_barrier(
        jnp.stack(_gradient_points(*(dy[:, i::_TILE] for i in range(_TILE))))
    )
    tiles = _gradient_points(*(lines[..., j::_TILE, :] for j in range(_TILE)))
    return jnp.stack(tiles, 1).reshape(_POINTS**2, -1, dy.shape[3])


def _along(x: jax.Array, axis: int, transform: Callable[..., Sequence[jax.Array]]) -> jax.Array:
    """Applies a transformation along one axis."""
    return jnp.stack(transform(*jnp.moveaxis(x, axis, 0)), axis)


# The matrices for one axis, written as the sums and differences that opposite points share.


def _kernel_points(a: jax.Array, b: jax.Array, c: jax.Array) -> tuple[jax.Array, ...]:
    """G: three taps -> six points."""
    even, odd = -(a + c / 2) / 1.5, -b * (_ROOT / 3)
    far_even, far_odd = (a + 2 * c) / 6, b * (_ROOT / 6)
    return a, even + odd, even - odd, far_even + far_odd, far_even - far_odd, c


def _kernel_taps(*m: jax.Array) -> tuple[jax.Array, ...]:
    """G^T: six points -> three taps."""
    near, far = (m[1] + m[2]) / 1.5, (m[3] + m[4]) / 6
    middle = (m[2] - m[1]) * (_ROOT / 3) + (m[3] - m[4]) * (_ROOT / 6)
    return m[0] - near + far, middle, 2 * far - near / 2 + m[5]


def _input_points(*d: jax.Array) -> tuple[jax.Array, ...]:
    """B^T: six inputs -> six points."""
    even, odd = d[4] - 2 * d[2], (_ROOT / 2) * d[3] - _ROOT * d[1]
    far_even, far_odd = d[4] - d[2] / 2, _ROOT * d[3] - (_ROOT / 2) * d[1]
    return (
        d[0] - 2.5 * d[2] + d[4],
        even + odd,
        even - odd,
        far_even + far_odd,
        far_even - far_odd,
        d[1] - 2.5 * d[3] + d[5],
    )


def _output_values(*m: jax.Array) -> tuple[jax.Array, ...]:
    """A^T: six points -> four outputs."""
    even, odd = m[1] + m[2], (_ROOT / 2) * (m[1] - m[2])
    far_even, far_odd = m[3] + m[4], _ROOT * (m[3] - m[4])
    return (
        m[0] + even + far_even,
        odd + far_odd,
        even / 2 + 2 * far_even,
        odd / 2 + 2 * far_odd + m[5],
    )


def _gradient_points(
    a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> tuple[jax.Array, ...]:
    """A: four outputs' gradients -> six points."""
    even, odd = a + c / 2, (_ROOT / 2) * (b + d / 2)
    far_even, far_odd = a + 2 * c, _ROOT * (b + 2 * d)
    return a, even + odd, even - odd, far_even + far_odd, far_even - far_odd, d
