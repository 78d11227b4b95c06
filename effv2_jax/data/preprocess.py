"""Crop, resize and normalise one picture, in training and evaluation, as its kind says (kinds.py).

The host crops and resizes; flips, augmentation and normalisation run on the device. A training
picture is truncated to uint8 after the resize, as the official code does before it augments. (With
no augmentation at all the official code keeps the fractions; here they are always dropped, so that
a quarter of the bytes goes to the device.)
"""

import dataclasses
import math

import numpy as np

from effv2_jax.data import decode_fast
from effv2_jax.data.decode import EncodedImage
from effv2_jax.data.kinds import Kind, get_kind
from effv2_jax.data.resize import resize_bicubic_v1, resize_bilinear
from effv2_jax.data.resize_pillow import evaluation_pillow, resize_pillow, scaled_size


def normalization(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std), float32 [3], in pixels 0..255: the network sees (pixel - mean) / std."""
    found = get_kind(kind)
    return np.asarray(found.mean, np.float32), np.asarray(found.std, np.float32)


@dataclasses.dataclass(frozen=True)
class Box:
    """A window of a picture: `top`, `left`, `height`, `width`, all in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class CropSampling:
    """How a training crop is drawn; the defaults are those of V2.

    Attributes:
      area: bounds of the crop's share of the picture.
      aspect: bounds of width / height.
      attempts: draws until the whole picture is taken instead.
      min_covered: crops below this share are drawn again (see `Kind`).
    """

    area: tuple[float, float] = (0.05, 1.0)
    aspect: tuple[float, float] = (0.75, 1.33)
    attempts: int = 100
    min_covered: float = 0.0


def _round(value: float) -> int:
    return int(np.rint(value))  # half to even, as C's lrintf


def _try_crop(
    height: int, width: int, aspect: float, rng: np.random.Generator, area: tuple[float, float]
) -> Box | None:
    min_area, max_area = area[0] * height * width, area[1] * height * width
    low = _round(math.sqrt(min_area / aspect))
    high = _round(math.sqrt(max_area / aspect))
    if _round(high * aspect) > width:
        # The largest height whose rounded width still fits.
        high = int((width + 0.5 - 1e-7) / aspect)
        if _round(high * aspect) > width:
            high -= 1
    high = min(high, height)
    low = min(low, high)
    h = low + int(rng.integers(high - low + 1))
    w = _round(h * aspect)
    # Rounding may have left the bounds: one pixel more, then one pixel less, is tried.
    if w * h < min_area:
        h += 1
        w = _round(h * aspect)
    if w * h > max_area:
        h -= 1
        w = _round(h * aspect)
    if not (min_area <= w * h <= max_area and 0 < w <= width and 0 < h <= height):
        return None
    # The upper bound is exclusive in TensorFlow: the last position is never drawn.
    top = int(rng.integers(height - h)) if h < height else 0
    left = int(rng.integers(width - w)) if w < width else 0
    return Box(top, left, h, w)


def sample_crop(
    height: int, width: int, *, rng: np.random.Generator, sampling: CropSampling
) -> Box:
    """Draws a training crop with the distribution of `tf.image.sample_distorted_bounding_box`.

    The aspect is uniform within its bounds, the height uniform among those that keep the area
    within its bounds (not the area itself, as in other libraries), the position uniform.

    Args:
      height: of the picture, pixels.
      width: of the picture, pixels.
      rng: all that decides.
      sampling: the bounds.

    Returns:
      The crop; the whole picture if every attempt failed.
    """
    for _ in range(sampling.attempts):
        low, high = sampling.aspect
        aspect = low + float(rng.random()) * (high - low)
        box = _try_crop(height, width, aspect, rng, sampling.area)
        if box and box.height * box.width >= sampling.min_covered * height * width:
            return box
    return Box(0, 0, height, width)


def central_crop(height: int, width: int, *, size: int, round_up: bool) -> Box:
    """The official central crop: size / (size + 32) of the shorter side, a square.

    Args:
      height: of the picture, pixels.
      width: of the picture, pixels.
      size: what the crop will be resized to, pixels.
      round_up: see `Kind`.
    """
    # float32 as in TensorFlow: the product may fall on either side of an integer.
    crop = int(np.float32(size / (size + 32)) * np.float32(min(height, width)))
    crop = max(crop, 1)  # the official code fails on one-pixel pictures
    extra = 1 if round_up else 0
    return Box((height - crop + extra) // 2, (width - crop + extra) // 2, crop, crop)


def _cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def training_box(
    height: int,
    width: int,
    *,
    size: int,
    rng: np.random.Generator,
    kind: Kind,
    sampling: CropSampling | None,
) -> Box:
    """The window of a picture that a training example shows.

    Args:
      height: of the picture, pixels.
      width: of the picture, pixels.
      size: of the training example, pixels.
      rng: all that decides.
      kind: of preprocessing.
      sampling: None: no crop, the whole picture.
    """
    whole = Box(0, 0, height, width)
    if sampling is None:
        return whole
    sampling = dataclasses.replace(sampling, min_covered=kind.min_covered)
    box = sample_crop(height, width, rng=rng, sampling=sampling)
    if kind.centre_when_whole and box == whole:
        return central_crop(height, width, size=size, round_up=kind.round_up)
    return box


def _reduction(box: Box, size: int) -> int:
    """The largest DCT reduction (1, 2, 4, 8) that leaves the crop at least as large as `size`."""
    factor = min(box.height, box.width) // size
    return max(r for r in (1, 2, 4, 8) if r <= max(factor, 1))


def training_image(
    image: EncodedImage | np.ndarray,
    *,
    size: int,
    rng: np.random.Generator,
    kind: Kind,
    sampling: CropSampling | None,
    fast_resize: bool = False,
) -> np.ndarray:
    """Crops and resizes a training picture.

    Args:
      image: encoded, or [H, W, 3] uint8.
      size: pixels per side.
      rng: all that decides.
      kind: of preprocessing.
      sampling: of the crop; None: the whole picture is squeezed to a square (official finetune).
      fast_resize: bilinear by OpenCV: equal but for rounding (decode_fast.py).

    Returns:
      [size, size, 3] uint8, truncated, not flipped.
    """
    height, width = (
        image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
    )
    box = training_box(height, width, size=size, rng=rng, kind=kind, sampling=sampling)
    if isinstance(image, np.ndarray):
        crop = _cut(image, box)
    else:
        r = _reduction(box, size) if image.reducible else 1
        reduced = Box(*(value // r for value in dataclasses.astuple(box)))
        crop = _cut(image.pixels(r), reduced)
    if kind.pillow:
        return resize_pillow(crop, (size, size), bicubic=kind.bicubic)
    if kind.bicubic:
        return np.clip(resize_bicubic_v1(crop, (size, size)), 0, 255).astype(np.uint8)
    if fast_resize:
        return decode_fast.resize_bilinear(crop, (size, size))
    return resize_bilinear(crop, (size, size), dtype=np.uint8)


def evaluation_box(height: int, width: int, *, size: int, kind: Kind) -> Box:
    """The window of a picture that an evaluation example shows.

    Args:
      height: of the picture, pixels.
      width: of the picture, pixels.
      size: of the example, pixels.
      kind: of preprocessing.
    """
    if kind.pillow:
        # Resizing comes first: back in the picture's own pixels, exact to one of them.
        scaled, (top, left) = scaled_size(height, width, size=size, kind=kind)
        down, right = height / scaled[0], width / scaled[1]
        return Box(*(round(v) for v in (top * down, left * right, size * down, size * right)))
    if size < kind.crop_below:
        return central_crop(height, width, size=size, round_up=kind.round_up)
    return Box(0, 0, height, width)


def evaluation_image(pixels: np.ndarray, *, size: int, kind: Kind) -> np.ndarray:
    """Crops and resizes an evaluation picture exactly as the official code, timm or torchvision.

    Args:
      pixels: [H, W, 3] uint8.
      size: pixels per side.
      kind: of preprocessing.

    Returns:
      [size, size, 3] float32, pixels 0..255 (bicubic overshoots), unrounded, not normalised.
    """
    if kind.pillow:
        return evaluation_pillow(pixels, size=size, kind=kind)
    box = evaluation_box(*pixels.shape[:2], size=size, kind=kind)
    resize = resize_bicubic_v1 if kind.bicubic else resize_bilinear
    return resize(_cut(pixels, box), (size, size))
