"""Depthwise convolution for XLA's CPU backend: shifted sums instead of a grouped convolution.

There the grouped convolution runs its one-channel groups at about 1 GFLOP/s, its input gradient at
stride 2 is a scalar loop over a dilated array, and its kernel gradient becomes a dense C x C
convolution of which the diagonal is kept. Shifted slices, multiplied and added, become vectorised
loops near the bandwidth of the cache (`docs/cpu_forms.md`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering import plain
from effv2_jax.models.lowering.geometry import Geometry
from effv2_jax.models.lowering.windows import interleave, materialize, pad_image, sum_type, window

# The kernel gradient adds this many rows in one expression. Taller images are cut into bands,
# since the size of the program grows with the rows: 48 costs about a second of compilation.
_MAX_UNROLLED_ROWS = 48

# It takes so many images at a time where the padded input of one has no more numbers than stay in a
# second-level cache with dy, or where those of all do not stay in a last-level cache either.
_TILE = 2
_SECOND_LEVEL, _LAST_LEVEL = 200_000, 6 * 2**18


def depthwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Depthwise convolution of x [N, H, W, C] with kernel [k, k, 1, C]: [N, H', W', C]."""
    if not geometry.has_own_forms:
        return plain.depthwise(x, kernel, geometry)
    return _shifted(x, kernel, geometry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return _shifted_forward(x, kernel, geometry)[0]


def _shifted_forward(
    x: jax.Array, kernel: jax.Array, geometry: Geometry
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Materialised, or XLA takes the middle of every window from x instead of the padded image, and
    # computes the activation that x comes from once for each.
    padded = materialize(pad_image(x, geometry.padding))
    total = jnp.zeros((), sum_type(x))
    for i in range(geometry.rows.kernel):
        for j in range(geometry.columns.kernel):
            total += window(padded, geometry, i, j).astype(total.dtype) * _tap(kernel, i, j, x)
    return materialize(total.astype(x.dtype)), (padded, kernel)


def _shifted_backward(
    geometry: Geometry, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    padded, kernel = residuals
    dy = materialize(dy)
    gradient = kernel_gradient(padded, dy, geometry)
    return (
        input_gradient(dy, kernel, geometry),
        gradient.reshape(kernel.shape).astype(kernel.dtype),
    )


_shifted.defvjp(_shifted_forward, _shifted_backward)


def input_gradient(dy: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Gradient by phases: each input pixel adds the taps that reach it, none that are zero.

    At stride 1 there is one phase, the convolution with the taps reversed. At stride 2 the four
    phases (even and odd rows and columns) are computed apart and interleaved: a quarter of the
    work of a convolution over the dilated gradient.

    Args:
        dy: [N, H', W', C].
        kernel: [k, k, 1, C].
        geometry: of the convolution.

    Returns:
        [N, H, W, C].
    """
    rows, columns = geometry.rows, geometry.columns
    above, below = rows.reach
    before, after = columns.reach
    padded = pad_image(dy, ((above, below), (before, after)))
    height, width = rows.phase_length, columns.phase_length
    phases = []
    for row_phase in range(rows.stride):
        for column_phase in range(columns.stride):
            total = jnp.zeros((dy.shape[0], height, width, dy.shape[3]), sum_type(dy))
            for i, down in rows.taps_of_phase(row_phase):
                for j, right in columns.taps_of_phase(column_phase):
                    top, left = above + down, before + right
                    part = padded[:, top : top + height, left : left + width]
                    total += part.astype(total.dtype) * _tap(kernel, i, j, dy)
            phases.append(total.astype(dy.dtype))
    return materialize(interleave(phases, geometry))


def kernel_gradient(padded: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """Gradient of each tap: the sum over images, rows and columns of its window times dy.

    Args:
        padded: [N, H, W, C], with its padding.
        dy: [N, H', W', C].
        geometry: of the convolution.

    Returns:
        [k * k, C], float32 or wider.
    """
    examples = dy.shape[0]
    if _SECOND_LEVEL * examples < padded.size <= _LAST_LEVEL:
        return _sums_of_taps(padded, dy, geometry)
    # Every tap reads both arrays again: a few images at a time they stay in the cache.
    tile = math.gcd(examples, _TILE)
    tiles = [v.reshape(-1, tile, *v.shape[1:]) for v in (padded, dy)]
    sums = lax.map(lambda pair: _sums_of_taps(*map(materialize, pair), geometry), tiles)
    return sums.sum(0)


def _sums_of_taps(padded: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """What `kernel_gradient` returns, of arrays that fit into the cache.

    A reduction per tap would read everything k * k times in strides. Adding the rows in one
    expression first leaves [k * k, N, bands, W, C] as one vectorised loop and a small sum.
    """
    rows, columns = geometry.rows, geometry.columns
    bands = -(-rows.out // _MAX_UNROLLED_ROWS)
    band = -(-rows.out // bands)
    missing = bands * band - rows.out  # zero rows that make the last band full
    padded = pad_image(padded, ((0, rows.stride * missing), (0, 0)))
    dy = pad_image(dy, ((0, missing), (0, 0)))
    sums = []
    for i in range(rows.kernel):
        for j in range(columns.kernel):
            total = jnp.zeros((), sum_type(dy))
            for row in range(band):  # this row of every band: [N, bands, W, C]
                first = i + rows.stride * row
                last = first + rows.stride * band * (bands - 1)
                part = padded[
                    :,
                    first : last + 1 : rows.stride * band,
                    j : j + columns.stride * (columns.out - 1) + 1 : columns.stride,
                ]
                total += part.astype(total.dtype) * dy[:, row::band].astype(total.dtype)
            sums.append(total)
    return jnp.stack(sums).sum((1, 2, 3))


def _tap(kernel: jax.Array, i: int, j: int, like: jax.Array) -> jax.Array:
    """Weights [C] of one tap, rounded to the compute type as the plain form rounds them."""
    return kernel[i, j, 0].astype(like.dtype).astype(sum_type(like))
