"""Resizing by Pillow, and the central crop behind it, as torchvision and timm evaluate.

Pillow's filters widen with the reduction (antialiasing) and round to uint8 after each direction.
The arithmetic of sizes and offsets is torchvision's: transforms/functional.py, resize and
center_crop; timm's crop_pct: data/transforms_factory.py.
"""

import math

import numpy as np
from PIL import Image

from effv2_jax.data.kinds import Kind


def resize_pillow(pixels: np.ndarray, size: tuple[int, int], *, bicubic: bool) -> np.ndarray:
    """Resizes [H, W, 3] uint8 to (height, width), uint8."""
    height, width = size
    filter_ = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize((width, height), filter_))


def scaled_size(
    height: int, width: int, *, size: int, kind: Kind
) -> tuple[tuple[int, int], tuple[int, int]]:
    """To which size a picture is resized for evaluation, and where its central crop begins.

    Args:
      height: of the picture, pixels.
      width: of the picture, pixels.
      size: of the crop, pixels per side.
      kind: says the share that the crop shows.

    Returns:
      (height, width) after resizing, and (top, left) of the crop in it.
    """
    short = math.floor(size / kind.share)
    if kind.squash:
        scaled = short, short
    elif height <= width:
        scaled = short, int(short * width / height)
    else:
        scaled = int(short * height / width), short
    top, left = (round((side - size) / 2) for side in scaled)  # halves to even
    return scaled, (top, left)


def evaluation_pillow(pixels: np.ndarray, *, size: int, kind: Kind) -> np.ndarray:
    """Resizes, then crops the centre.

    Args:
      pixels: [H, W, 3] uint8.
      size: pixels per side.
      kind: says the share and the filter.

    Returns:
      [size, size, 3] float32 of whole numbers 0..255.
    """
    scaled, (top, left) = scaled_size(*pixels.shape[:2], size=size, kind=kind)
    resized = resize_pillow(np.ascontiguousarray(pixels), scaled, bicubic=kind.bicubic)
    return resized[top : top + size, left : left + size].astype(np.float32)
