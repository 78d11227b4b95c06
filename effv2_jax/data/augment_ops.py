"""The operations of AutoAugment and RandAugment on one uint8 image, equal to the official ones.

Official: efficientnetv2/autoaugment.py of google/automl, whose arithmetic (truncating casts,
thresholds modulo 256, a "mean" that depends on the image's size only, ...) is kept on purpose.
Every operation is one of five kinds:

* a table of 256 values per channel: AutoContrast, Equalize, Invert, Posterize, Solarize,
  SolarizeAdd, Contrast, Brightness;
* a gather of the nearest pixel under an affine map: Rotate, Shear, Translate;
* a blend with the grey image: Color;
* a blend with the image smoothed by a 3x3 filter: Sharpness;
* a box of one colour: Cutout.

Each product that is then added to something goes through `_rounded`, because compilers may fuse
the two into one multiply-add with a single rounding; the results are truncated to integers, so
one such bit moves a pixel by a whole level.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Fills what geometric operations and Cutout leave empty.
REPLACE = 128

_PIXELS = np.arange(256, dtype=np.int32)
_CHANNEL_OFFSETS = 256 * np.arange(3, dtype=np.int32)
# 255 / d for d = 0..255 (0 unused), rounded on the host: devices may divide less exactly.
_STRETCH = np.float32(255.0) / np.maximum(np.arange(256), 1).astype(np.float32)
# What a red, green or blue value adds to grey; a look-up is five times faster than the products.
_SCALED = _PIXELS.astype(np.float32) * np.float32(1 / 255)
_GREY_SHARES = tuple(_SCALED * np.float32(weight) for weight in (0.2989, 0.587, 0.114))


def _rounded(product: jax.Array) -> jax.Array:
    """Returns its argument; stands between a product and a sum so that they are not fused.

    A minimum with a number beyond every value that occurs changes nothing, but no compiler may
    move the addition across it.
    """
    return jnp.minimum(product, np.float32(1e30))


def _to_uint8(values: jax.Array) -> jax.Array:
    """Clips float32 to 0..255 and truncates, as the official casts do."""
    return jnp.clip(values, 0.0, 255.0).astype(jnp.int32).astype(jnp.uint8)


def blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Moves from `degenerate` (factor 0) to `image` (factor 1) and beyond.

    Args:
      degenerate: uint8, broadcastable to `image`.
      image: uint8.
      factor: float32 scalar >= 0.

    Returns:
      uint8, truncated. Official: autoaugment.py blend; its special cases 0 and 1, and leaving out
      the clipping between them, give the same values.
    """
    start = degenerate.astype(jnp.float32)
    return _to_uint8(start + _rounded(factor * (image.astype(jnp.float32) - start)))


# Tables: uint8 [256] for all channels or [3, 256].


def identity_table() -> jax.Array:
    """Returns the table that changes nothing, uint8 [256]."""
    return jnp.asarray(_PIXELS, jnp.uint8)


def invert_table() -> jax.Array:
    """Returns 255 - pixel, uint8 [256]."""
    return jnp.asarray(255 - _PIXELS, jnp.uint8)


def posterize_table(shift: jax.Array) -> jax.Array:
    """Returns pixels with their lowest `shift` (0..7) bits cleared, uint8 [256]."""
    shift = shift.astype(jnp.int32)
    return ((_PIXELS >> shift) << shift).astype(jnp.uint8)


def solarize_table(threshold: jax.Array) -> jax.Array:
    """Returns pixels inverted from `threshold` (0..255) on, uint8 [256]."""
    return jnp.where(threshold > _PIXELS, _PIXELS, 255 - _PIXELS).astype(jnp.uint8)


def solarize_add_table(addition: jax.Array) -> jax.Array:
    """Returns pixels below 128 brightened by the integer `addition`, uint8 [256]."""
    added = jnp.clip(_PIXELS + addition.astype(jnp.int32), 0, 255)
    return jnp.where(_PIXELS < 128, added, _PIXELS).astype(jnp.uint8)


def brightness_table(factor: jax.Array) -> jax.Array:
    """Returns the blend of black and the pixel, uint8 [256]."""
    return blend(jnp.zeros((256,), jnp.uint8), identity_table(), factor)


def contrast_table(factor: jax.Array, *, height: int, width: int) -> jax.Array:
    """Returns the blend of one grey and the pixel, uint8 [256].

    The grey is the number of pixels / 256, at most 255: the official code sums the histogram's
    counts instead of averaging over them.
    """
    grey = np.uint8(min(height * width / 256.0, 255.0))
    return blend(jnp.full((256,), grey), identity_table(), factor)


def autocontrast_table(image: jax.Array) -> jax.Array:
    """Returns the table that stretches each channel to 0..255, uint8 [3, 256].

    A channel of one value stays as it is.
    """
    width = image.shape[1]
    # First over rows of 3 W values, then over pixels: 20 times faster on a CPU than over (H, W).
    rows = image.reshape(-1, width * 3)
    low = rows.min(axis=0).reshape(width, 3).min(axis=0).astype(jnp.int32)[:, None]
    high = rows.max(axis=0).reshape(width, 3).max(axis=0).astype(jnp.int32)[:, None]
    scale = jnp.asarray(_STRETCH)[high - low]
    offset = _rounded(-low.astype(jnp.float32) * scale)
    stretched = _to_uint8(_rounded(_PIXELS.astype(np.float32) * scale) + offset)
    return jnp.where(high > low, stretched, identity_table())


def equalize_table(image: jax.Array, *, wanted: jax.Array | bool = True) -> jax.Array:
    """Returns the table that flattens each channel's histogram, uint8 [3, 256].

    Integer arithmetic; a channel whose step is 0 (nearly all pixels in the last bin) stays.

    Args:
      image: uint8 [H, W, 3].
      wanted: bool scalar; False: nobody uses the table, so save counting.
    """
    counts = histogram(image, wanted=wanted)
    last = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
    step = (image.shape[0] * image.shape[1] - jnp.take_along_axis(counts, last, axis=1)) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    # The official table is shifted by one entry and starts with 0.
    values = jnp.where(_PIXELS == 0, 0, (below + step // 2) // jnp.maximum(step, 1))
    return jnp.where(step == 0, _PIXELS, jnp.clip(values, 0, 255)).astype(jnp.uint8)


def histogram(image: jax.Array, *, wanted: jax.Array | bool = True) -> jax.Array:
    """Counts the values of each channel.

    Args:
      image: uint8 [H, W, 3].
      wanted: bool scalar; False: all counts are 0.

    Returns:
      int32 [3, 256].
    """
    bins = (image.astype(jnp.int32) + _CHANNEL_OFFSETS).reshape(-1)
    # A bin out of bounds is dropped before the atomic addition that costs a GPU its time.
    bins = jnp.where(wanted, bins, 768)
    counts = jnp.zeros((768,), jnp.int32).at[bins].add(1, mode="drop")
    return counts.reshape(3, 256)


def apply_table(image: jax.Array, table: jax.Array) -> jax.Array:
    """Looks every pixel up.

    Args:
      image: uint8 [H, W, 3].
      table: uint8 [3, 256].

    Returns:
      uint8 [H, W, 3].
    """
    index = image.astype(jnp.int32) + _CHANNEL_OFFSETS
    return table.reshape(-1).at[index].get(mode="promise_in_bounds")


# Affine maps: six numbers (a, b, c, d, e, f): output pixel (x, y) shows the input's pixel
# (a x + b y + c, d x + e y + f).


def shear_x_matrix(level: jax.Array) -> jax.Array:
    """Returns the map of ShearX, float32 [6]."""
    return _matrix(1, level, 0, 0, 1, 0)


def shear_y_matrix(level: jax.Array) -> jax.Array:
    """Returns the map of ShearY, float32 [6]."""
    return _matrix(1, 0, 0, level, 1, 0)


def translate_x_matrix(pixels: jax.Array) -> jax.Array:
    """Returns the map of TranslateX by `pixels` (to the left if positive), float32 [6]."""
    return _matrix(1, 0, pixels, 0, 1, 0)


def translate_y_matrix(pixels: jax.Array) -> jax.Array:
    """Returns the map of TranslateY by `pixels` (upwards if positive), float32 [6]."""
    return _matrix(1, 0, 0, 0, 1, pixels)


def rotate_matrix(cosine: jax.Array, sine: jax.Array, *, height: int, width: int) -> jax.Array:
    """Returns the map of a rotation about the image's centre, float32 [6].

    Args:
      cosine: float32 scalar; computed on the host, so that every device rotates alike.
      sine: float32 scalar.
      height: of the image in pixels.
      width: of the image in pixels.

    Returns:
      float32 [6]. Official: tensorflow_addons image/transform_ops.py.
    """
    right, bottom = np.float32(width - 1), np.float32(height - 1)
    shift_x = (right - (_rounded(cosine * right) - _rounded(sine * bottom))) * 0.5
    shift_y = (bottom - (_rounded(sine * right) + _rounded(cosine * bottom))) * 0.5
    return _matrix(cosine, -sine, shift_x, sine, cosine, shift_y)


def _matrix(*entries: jax.Array | float) -> jax.Array:
    return jnp.stack([jnp.asarray(entry, jnp.float32) for entry in entries])


def apply_affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Fetches for every output pixel the nearest input pixel; 128 where there is none.

    Args:
      image: uint8 [H, W, 3].
      matrix: float32 [6].

    Returns:
      uint8 [H, W, 3]. Coordinates are float32 and round half away from zero, as in the official
      kernel.
    """
    height, width, _ = image.shape
    column = np.arange(width, dtype=np.float32)[None, :]
    row = np.arange(height, dtype=np.float32)[:, None]

    def nearest(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return jax.lax.round(_rounded(a * column) + _rounded(b * row) + c).astype(jnp.int32)

    x, y = nearest(*matrix[:3]), nearest(*matrix[3:])
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = jnp.where(inside, y * width + x, 0)
    pixels = image.reshape(-1, 3).at[index].get(mode="promise_in_bounds")
    return jnp.where(inside[..., None], pixels, np.uint8(REPLACE))


def color(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends the grey image and the image.

    Args:
      image: uint8 [H, W, 3].
      factor: float32 scalar; 0 is grey, 1 the image.

    Returns:
      uint8 [H, W, 3].
    """
    index = image.astype(jnp.int32)
    red, green, blue = (
        jnp.asarray(shares).at[index[..., channel]].get(mode="promise_in_bounds")
        for channel, shares in enumerate(_GREY_SHARES)
    )
    grey = _to_uint8(((red + green) + blue) * np.float32(255.5))
    return blend(grey[..., None], image, factor)


def sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends the smoothed image and the image.

    Args:
      image: uint8 [H, W, 3], at least 3 x 3 pixels.
      factor: float32 scalar; 0 is smooth, 1 the image.

    Returns:
      uint8 [H, W, 3]; the outermost pixels stay as they are.
    """
    height, width, channels = image.shape
    # As rows of W * C values: 5 times faster on a CPU than with a last axis of 3.
    length = width * channels
    rows = image.reshape(height, length)
    values = jnp.pad(rows, ((1, 1), (channels, channels))).astype(jnp.float32)
    neighbour = _rounded(values * (np.float32(1) / np.float32(13)))
    centre = _rounded(values * (np.float32(5) / np.float32(13)))
    total = jnp.zeros((height, length), jnp.float32)
    # In the order of the official convolution: the sum's last bit decides the truncated value.
    for i in range(3):
        for j in range(3):
            source = centre if (i, j) == (1, 1) else neighbour
            left = j * channels
            total = total + source[i : i + height, left : left + length]
    row = np.arange(height)[:, None]
    column = np.arange(length)[None, :]
    inner = (row > 0) & (row < height - 1) & (column >= channels) & (column < length - channels)
    smooth = jnp.where(inner, _to_uint8(total), rows)
    return blend(smooth, rows, factor).reshape(image.shape)


def cutout(image: jax.Array, *, pad: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Paints a square of grey.

    Args:
      image: uint8 [H, W, 3].
      pad: half the square's side in pixels.
      y: row of its centre.
      x: column of its centre.

    Returns:
      uint8 [H, W, 3]; the square is cut at the border.
    """
    return jnp.where(square(*image.shape[:2], pad=pad, y=y, x=x), np.uint8(REPLACE), image)


def square(
    height: int, width: int, *, pad: jax.Array | int, y: jax.Array, x: jax.Array
) -> jax.Array:
    """Returns bool [H, W, 1], true within rows y-pad..y+pad-1 and columns x-pad..x+pad-1."""
    row = np.arange(height)[:, None, None]
    column = np.arange(width)[None, :, None]
    return (row >= y - pad) & (row < y + pad) & (column >= x - pad) & (column < x + pad)


# How to make the table (uint8 [3, 256]) or the map (float32 [6]) of an operation, from the image
# (uint8 [H, W, 3]) and the two arguments of `policy.operation_arguments`.
Maker = Callable[[jax.Array, jax.Array], jax.Array]


def _for_all_channels(table: jax.Array) -> jax.Array:
    return jnp.broadcast_to(table, (3, 256))


TABLES: dict[str, Maker] = {
    "AutoContrast": lambda image, _: autocontrast_table(image),
    "Equalize": lambda image, _: equalize_table(image),
    "Invert": lambda image, _: _for_all_channels(invert_table()),
    "Posterize": lambda image, values: _for_all_channels(posterize_table(values[0])),
    "Solarize": lambda image, values: _for_all_channels(solarize_table(values[0])),
    "SolarizeAdd": lambda image, values: _for_all_channels(solarize_add_table(values[0])),
    "Contrast": lambda image, values: _for_all_channels(
        contrast_table(values[0], height=image.shape[0], width=image.shape[1])
    ),
    "Brightness": lambda image, values: _for_all_channels(brightness_table(values[0])),
}

MATRICES: dict[str, Maker] = {
    "Rotate": lambda image, values: rotate_matrix(
        values[0], values[1], height=image.shape[0], width=image.shape[1]
    ),
    "ShearX": lambda image, values: shear_x_matrix(values[0]),
    "ShearY": lambda image, values: shear_y_matrix(values[0]),
    "TranslateX": lambda image, values: translate_x_matrix(values[0]),
    "TranslateY": lambda image, values: translate_y_matrix(values[0]),
}
