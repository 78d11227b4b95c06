"""Pieces of images that the CPU forms are made of."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering.geometry import Geometry


def sum_type(x: jax.Array) -> jnp.dtype:
    """Type that sums over x are kept in: float32 unless x is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def materialize(x: jax.Array) -> jax.Array:
    """Returns x, and makes XLA's CPU backend compute it once.

    Left to itself it copies every cheap expression into each of its consumers: whole depthwise
    convolutions are computed three or four times in a backward pass, and barriers are gone before
    it fuses (pads and concatenations it does not copy: there they suffice). It never copies a
    division. This one is by a number made of the bits of x that is always 1, which only the code
    generator behind XLA finds out, and removes.
    """
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    one = lax.min(lax.bitwise_or(bits, bits.dtype.type(1)), jnp.ones_like(bits))
    return x / one.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns x as numbers of that type, rounded to the nearest, the even one of two.

    From float32 to bfloat16 by the bits, without the test for NaN that XLA's CPU backend makes for
    each, and for which it computes with half a vector: silu and this take two thirds of the time.
    The NaN of arithmetic, of which only the first bit of the mantissa is set, stays one; one with
    the first eight set becomes zero, a signalling one infinite.
    """
    if x.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


@rounded.defjvp
def _rounded_jvp(
    dtype: jnp.dtype, inputs: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return rounded(*inputs, dtype), tangents[0].astype(dtype)


def as_rows(x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N * H * W, C]."""
    return x.reshape(-1, x.shape[3])


def pad_image(x: jax.Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    """Adds ((top, bottom), (left, right)) zeros to x [N, H, W, C]."""
    if not any(map(any, padding)):
        return x
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def window(padded: jax.Array, geometry: Geometry, i: int, j: int) -> jax.Array:
    """What tap (i, j) sees of the padded input: one pixel per output, [N, H', W', C]."""
    rows, columns = geometry.rows, geometry.columns
    return padded[
        :,
        i : i + rows.stride * (rows.out - 1) + 1 : rows.stride,
        j : j + columns.stride * (columns.out - 1) + 1 : columns.stride,
    ]


def interleave(phases: Sequence[jax.Array], geometry: Geometry) -> jax.Array:
    """Puts the phases of an image back in place.

    Args:
        phases: stride * stride images [N, phase_length, phase_length, C], the column's phase
            changing fastest.
        geometry: of the convolution whose input is put together.

    Returns:
        [N, H, W, C]: pixel (h, w) is pixel (h // s, w // s) of phase (h % s, w % s), s the stride.
    """
    down, right = geometry.strides
    if down == right == 1:
        return phases[0]
    n, height, width, channels = phases[0].shape
    lines = [jnp.stack(phases[r * right : (r + 1) * right], 3) for r in range(down)]
    image = jnp.stack(lines, 2).reshape(n, height * down, width * right, channels)
    return image[:, : geometry.rows.size, : geometry.columns.size]
