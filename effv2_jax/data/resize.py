"""TensorFlow's image resizing in NumPy: the three kernels the official code uses.

None of them antialiases. Each is separable: two small tables say which rows (columns) to read and
with which weights. All arithmetic is float32 in TensorFlow's order, along the width first, because
training truncates the result to uint8 and a different order would flip values at the border.
"""

import functools

import numpy as np

_CUBIC_TABLE_SIZE = 1024  # TensorFlow reads cubic weights from a table of this many fractions


@functools.lru_cache(maxsize=512)
def _linear_table(
    source: int, target: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # lower, upper [target] intp; weight float32
    scale = np.float32(source) / np.float32(target)
    position = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(position)
    lower = np.maximum(floor, 0).astype(np.intp)
    upper = np.minimum(np.ceil(position), source - 1).astype(np.intp)
    return lower, upper, position - floor


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`tf.image.resize(image, size)`: bilinear, half-pixel centres, no antialiasing.

    Args:
      image: [H, W, C], uint8 or float32.
      size: (height, width) of the result, pixels.

    Returns:
      [height, width, C] float32, unrounded, in the input's units.
    """
    height, width = size
    lower, upper, weight = _linear_table(image.shape[1], width)
    left = np.take(image, lower, axis=1).astype(np.float32)
    rows = np.take(image, upper, axis=1).astype(np.float32)
    rows -= left
    rows *= weight[None, :, None]
    rows += left
    lower, upper, weight = _linear_table(image.shape[0], height)
    top = rows[lower]
    result = rows[upper]
    result -= top
    result *= weight[:, None, None]
    result += top
    return result


@functools.lru_cache(maxsize=512)
def _cubic_table(
    source: int, target: int, half_pixel: bool
) -> tuple[np.ndarray, np.ndarray]:  # index [4, target] intp, weight [4, target] float32
    scale = np.float32(source) / np.float32(target)
    if half_pixel:
        position = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale
        position -= np.float32(0.5)
        a = -0.5
    else:
        position = np.arange(target, dtype=np.float32) * scale
        a = -0.75
    base = np.floor(position)
    # The fraction is rounded to 1/1024: TensorFlow reads the weights from a table.
    step = np.rint((position - base) * np.float32(_CUBIC_TABLE_SIZE)) / _CUBIC_TABLE_SIZE
    near = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1  # noqa: E731  |x| <= 1
    far = lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a  # noqa: E731  1 < |x| < 2
    weight = np.stack([far(step + 1), near(step), near(1 - step), far(2 - step)])
    index = base.astype(np.intp)[None, :] + np.arange(-1, 3)[:, None]
    inside = (index >= 0) & (index < source)
    if half_pixel:
        weight = np.where(inside, weight, 0.0)
        weight = weight / weight.sum(axis=0)
    return np.clip(index, 0, source - 1), weight.astype(np.float32)


def _resize_cubic(image: np.ndarray, size: tuple[int, int], half_pixel: bool) -> np.ndarray:
    index, weight = _cubic_table(image.shape[1], size[1], half_pixel)
    rows = np.take(image, index[0], axis=1) * weight[0][None, :, None]
    for k in range(1, 4):
        rows += np.take(image, index[k], axis=1) * weight[k][None, :, None]
    index, weight = _cubic_table(image.shape[0], size[0], half_pixel)
    result = rows[index[0]] * weight[0][:, None, None]
    for k in range(1, 4):
        result += rows[index[k]] * weight[k][:, None, None]
    return result


def resize_bicubic_v1(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`tf.compat.v1.image.resize_bicubic`, as EfficientNet V1 was trained and evaluated with.

    No half-pixel centres (source = i * in / out), A = -0.75, edges replicated.

    Args:
      image: [H, W, C], uint8 or float32.
      size: (height, width) of the result, pixels.

    Returns:
      [height, width, C] float32; it overshoots the input's range, as the official one does.
    """
    return _resize_cubic(image, size, half_pixel=False)


def resize_bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`tf.image.resize(image, size, 'bicubic')`: half-pixel centres, A = -0.5.

    Taps outside the image are dropped and the others renormalised. Arguments and result as in
    `resize_bicubic_v1`.
    """
    return _resize_cubic(image, size, half_pixel=True)
