import concurrent.futures

import numpy as np
import pytest

from effv2_jax.data.resize import resize_bicubic, resize_bicubic_v1, resize_bilinear
from tests import reference
from tests.data import pictures

RESIZES = {
    "bilinear": resize_bilinear,
    "v1_bicubic": resize_bicubic_v1,
    "v2_bicubic": resize_bicubic,
}
SIZES = ["7x9", "14x18", "5x5", "3x4", "1x1", "16x11", "20x6"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RESIZES)
def test_resizing_equals_tensorflow(name, size):
    arrays = reference.load_npz("preprocess/preprocess.npz")
    height, width = map(int, size.split("x"))
    result = RESIZES[name](arrays["resize/input"], (height, width))
    assert result.dtype == np.float32
    # Bilinear does TensorFlow's operations in TensorFlow's order: equal on any IEEE machine.
    # Bicubic sums four products, whose order a compiler may choose: a few units of 2**-16.
    tolerance = 0 if name == "bilinear" else 1e-4
    np.testing.assert_allclose(result, arrays[f"resize/{name}_{size}"], atol=tolerance, rtol=0)


def _bilinear_by_the_definition(image, height, width):
    def taps(source, target):
        position = (np.arange(target) + 0.5) * source / target - 0.5
        low = np.floor(position).astype(int)
        return np.clip(low, 0, source - 1), np.clip(low + 1, 0, source - 1), position - low

    top, bottom, v = taps(image.shape[0], height)
    left, right, u = taps(image.shape[1], width)
    u, v = u[None, :, None], v[:, None, None]
    rows = image[:, left] * (1 - u) + image[:, right] * u
    return rows[top] * (1 - v) + rows[bottom] * v


@pytest.mark.parametrize("shape", [(61, 83), (300, 40), (40, 300), (1, 1), (129, 128), (2000, 3)])
def test_bilinear_equals_its_definition(shape):
    image = pictures.photograph(shape[1], shape[0])
    expected = _bilinear_by_the_definition(image.astype(np.float64), 64, 48)
    # float32 against float64, of 255.
    np.testing.assert_allclose(resize_bilinear(image, (64, 48)), expected, atol=2e-4)


def test_uint8_is_truncated_not_rounded():
    image = np.array([[[0], [255]]], np.uint8).repeat(3, axis=2)
    values = resize_bilinear(image, (1, 4))[0, :, 0]
    assert values.tolist() == [0.0, 63.75, 191.25, 255.0]
    assert resize_bilinear(image, (1, 4), dtype=np.uint8)[0, :, 0].tolist() == [0, 63, 191, 255]


def test_results_do_not_share_memory_between_calls():
    first = resize_bilinear(pictures.photograph(seed=1), (32, 32))
    kept = first.copy()
    resize_bilinear(pictures.photograph(seed=2), (32, 32))
    resize_bicubic_v1(pictures.photograph(seed=3), (32, 32))
    np.testing.assert_array_equal(first, kept)


def test_threads_do_not_disturb_each_other():
    images = [pictures.photograph(120 + i, 90 + i, seed=i) for i in range(16)]
    expected = [resize_bilinear(image, (64, 64)) for image in images]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda image: resize_bilinear(image, (64, 64)), images))
            for result, value in zip(results, expected, strict=True):
                np.testing.assert_array_equal(result, value)


def test_opencv_differs_from_the_official_resize_by_rounding_only():
    pytest.importorskip("cv2")
    from effv2_jax.data import decode_fast

    for size in (64, 96, 224):
        image = pictures.photograph(250, 180)
        exact = resize_bilinear(image, (size, size), dtype=np.uint8).astype(int)
        difference = np.abs(decode_fast.resize_bilinear(image, (size, size)) - exact)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.02  # measured 0 to 0.6 %
