"""3x3 convolutions at stride 1 with 16 products for every 2x2 outputs instead of 36.

Winograd's F(2x2, 3x3), as Lavin and Gray wrote it down for networks (arXiv:1509.09308): an output
tile is A^T [(G g G^T) * (B^T d B)] A, with d the 4x4 inputs that it sees. Sums over channels are
made between the transformations, so they are 16 matrix products per image. The transformations
only add, subtract and halve; results differ from the direct convolution's by rounding.

They also write and read four times the input and the output. Image by image that happens in the
caches, where it costs less than is saved unless the channels are few.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering.geometry import Geometry
from effv2_jax.models.lowering.windows import materialize


def is_faster(x: jax.Array, kernel_shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether `convolve` is faster than XLA's convolution (measured in `docs/performance.md`).

    With 24 channels and filters it is not, with 32 and 32 it is.
    """
    return _applies(x, geometry) and kernel_shape[2] * kernel_shape[3] >= 1024


def is_gradient_faster(x: jax.Array, kernel_shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether `kernel_gradient` is faster than the other forms of it."""
    channels, filters = kernel_shape[2:]
    return _applies(x, geometry) and (filters >= 2 * channels or channels % 16 > 0)


def _applies(x: jax.Array, geometry: Geometry) -> bool:
    return (
        x.dtype == jnp.float32  # narrower types would round the transformed values
        and geometry.strides == (1, 1)
        and all(axis.kernel == 3 and axis.out >= 8 for axis in (geometry.rows, geometry.columns))
    )


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution of x [N, H, W, C] with kernel [3, 3, C, O] at stride 1: [N, H', W', O]."""
    transformed = _kernel_tiles(kernel)

    def convolve_image(image: jax.Array) -> jax.Array:
        products = lax.dot_general(
            _input_tiles(image, geometry), transformed, (((2,), (1,)), ((0,), (0,)))
        )
        return _outputs(products, geometry)

    return lax.map(convolve_image, x)


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """Gradient of `convolve` with respect to its kernel, from dy [N, H', W', O]: [3, 3, C, O]."""

    def add_image(total: jax.Array, image: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        tiles, gradients = _input_tiles(image[0], geometry), _output_tiles(image[1], geometry)
        return total + lax.dot_general(tiles, gradients, (((1,), (1,)), ((0,), (0,)))), None

    shape = (16, x.shape[3], dy.shape[3])
    total, _ = lax.scan(add_image, jnp.zeros(shape, x.dtype), (x, dy))
    total = total.reshape(4, 4, *shape[1:])
    taps = _along_both(total, lambda a, b, c, e: (a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + e))
    return jnp.stack([jnp.stack(line) for line in taps])


def _tiles(geometry: Geometry) -> tuple[int, int]:
    """Rows and columns of tiles; the last of an odd axis is half outside."""
    return -(-geometry.rows.out // 2), -(-geometry.columns.out // 2)


def _kernel_tiles(kernel: jax.Array) -> jax.Array:
    """G g G^T: [3, 3, C, O] -> [16, C, O]."""
    tile = _along_both(kernel, lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, c))
    return jnp.stack([v for line in tile for v in line])


def _input_tiles(image: jax.Array, geometry: Geometry) -> jax.Array:
    """B^T d B of every tile: image [H, W, C] -> [16, tiles, C]."""
    rows, columns = _tiles(geometry)
    (top, _), (left, _) = geometry.padding
    bottom, right = (
        2 * tiles + 2 - size - low
        for tiles, size, low in zip((rows, columns), image.shape, (top, left), strict=False)
    )
    padded = materialize(jnp.pad(image, ((top, bottom), (left, right), (0, 0))))
    d = [
        [padded[i : i + 2 * rows : 2, j : j + 2 * columns : 2] for j in range(4)] for i in range(4)
    ]
    return _stack(_along_both(d, lambda a, b, c, e: (a - c, b + c, c - b, b - e)))


def _outputs(products: jax.Array, geometry: Geometry) -> jax.Array:
    """A^T m A of every tile, put together: [16, tiles, O] -> [H', W', O]."""
    rows, columns = _tiles(geometry)
    m = products.reshape(4, 4, rows, columns, -1)
    tile = _along_both(m, lambda a, b, c, e: (a + b + c, b - c - e))
    image = jnp.stack([jnp.stack(line, 2) for line in tile], 1)
    image = image.reshape(2 * rows, 2 * columns, -1)
    return image[: geometry.rows.out, : geometry.columns.out]


def _output_tiles(dy: jax.Array, geometry: Geometry) -> jax.Array:
    """A dy A^T of every tile, the transpose of `_outputs`: [H', W', O] -> [16, tiles, O]."""
    rows, columns = _tiles(geometry)
    missing = ((0, 2 * rows - dy.shape[0]), (0, 2 * columns - dy.shape[1]), (0, 0))
    dy = materialize(jnp.pad(dy, missing))
    tile = [[dy[i::2, j::2] for j in range(2)] for i in range(2)]
    return _stack(_along_both(tile, lambda a, b: (a, a + b, a - b, -b)))


def _along_both(
    values: Sequence[Sequence[jax.Array]], transform: Callable[..., Sequence[jax.Array]]
) -> list[list[jax.Array]]:
    """Applies a transformation to the rows, then to the columns of a matrix of arrays."""
    lines = [transform(*line) for line in values]
    columns = [transform(*column) for column in zip(*lines, strict=True)]
    return [list(line) for line in zip(*columns, strict=True)]


def _stack(values: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """4 x 4 arrays [rows, columns, C] -> [16, rows * columns, C]."""
    return jnp.stack([v.reshape(-1, v.shape[-1]) for line in values for v in line])
