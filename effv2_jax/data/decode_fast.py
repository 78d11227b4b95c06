"""The optional fast path: libjpeg-turbo and OpenCV (`pip install effv2_jax[fast-decode]`).

The decoder is not only faster than Pillow, it is also closer to the official code: with the fast
integer DCT and smooth chroma upsampling, libjpeg-turbo gives TensorFlow's pixels bit by bit, while
Pillow's accurate DCT differs by up to 6 of 255 (1.0 on average). OpenCV's float resize is the same
bilinear interpolation as `resize.resize_bilinear`, rounded in another order: after the truncation
to uint8 under 1 % of the values differ, by 1.
"""

import importlib.util

import numpy as np

from effv2_jax.errors import UserError


def require() -> None:
    """Checks that the optional packages are installed.

    Raises:
      UserError: with the command that installs them.
    """
    missing = [name for name in ("simplejpeg", "cv2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"data.decoder: 'simplejpeg' needs the packages simplejpeg and opencv "
            f"({', '.join(missing)} not found): pip install 'effv2_jax[fast-decode]', or set "
            f"data.decoder='pillow'"
        )


def decode_jpeg(data: bytes) -> np.ndarray:
    """Decodes a grey or colour JPEG (not CMYK) exactly as `tf.io.decode_jpeg` does by default.

    Returns:
      [H, W, 3] uint8, as stored: without EXIF orientation.

    Raises:
      ValueError: the data are damaged or end early.
    """
    import simplejpeg

    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`resize.resize_bilinear(image, size, dtype=np.uint8)`, up to rounding.

    Args:
      image: [H, W, 3] uint8.
      size: (height, width) of the result, pixels.

    Returns:
      [height, width, 3] uint8, truncated.
    """
    import cv2

    height, width = size
    resized = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return resized.astype(np.uint8)
