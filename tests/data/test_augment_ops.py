"""The operations against arrays made by the official code, and against plain NumPy."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.data import augment_ops as ops
from effv2_jax.data.augment_apply import apply_operations
from effv2_jax.data.policy import (
    AUTOAUGMENT_V0,
    OPERATIONS,
    SIGNED,
    level_to_argument,
    operation_arguments,
)
from tests import reference

IMAGES = ("img0", "img1", "img2")
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
RANDAUGMENT = {"cutout": 40, "translate": 100}

_apply = jax.jit(apply_operations, static_argnames="implementation")


def _apply_each(image, names, arguments, centres=None, implementation="map"):
    """One operation to each copy of one image."""
    count = len(names)
    centres = np.zeros((count, 2)) if centres is None else np.asarray(centres)
    return np.asarray(
        _apply(
            np.repeat(image[None], count, axis=0),
            np.asarray([[OPERATIONS.index(name)] for name in names], np.int32),
            arguments=np.asarray(arguments, np.float32)[:, None],
            centres=centres.astype(np.int32)[:, None],
            implementation=implementation,
        )
    )


def _negative(name, arguments):
    first, second = arguments
    return (first, -second) if name == "Rotate" else (-first, second)


def _reference_cases(image_name):
    """(key, operation, arguments, centre) of every array of ops.npz made from one image.

    Keys are Op/img, Op/m<magnitude>[_neg]/img, Op/factor<x>/img or Cutout/pad<p>_y<y>_x<x>/img.
    """
    for key, call in reference.load_json("augment/levels.json")["calls"].items():
        name, *middle, source = key.split("/")
        if source != image_name:
            continue
        arguments, centre = (call[0] if call else 0.0, 0.0), (0, 0)
        if name == "Cutout":
            centre = call[1:]
        elif middle and middle[0].startswith("m"):
            magnitude, _, negative = middle[0][1:].partition("_")
            arguments = operation_arguments(name, float(magnitude), **RANDAUGMENT)
            if negative:
                arguments = _negative(name, arguments)
        yield key, name, arguments, centre


@pytest.mark.parametrize("implementation", ["map", "batch"])
@pytest.mark.parametrize("image_name", IMAGES)
def test_every_operation_equals_the_official_code_bit_by_bit(image_name, implementation):
    keys, names, arguments, centres = zip(*_reference_cases(image_name), strict=True)
    image = reference.load_npz("augment/images.npz")[image_name]
    got = _apply_each(image, names, arguments, centres, implementation)
    expected = reference.load_npz("augment/ops.npz")
    wrong = {
        key: int(np.any(result != expected[key], axis=-1).sum())
        for key, result in zip(keys, got, strict=True)
        if not np.array_equal(result, expected[key])
    }
    assert not wrong, f"pixels that differ: {wrong}"


def test_the_reference_covers_every_operation_and_every_array():
    counts = collections.Counter()
    for image_name in IMAGES:
        counts.update(name for _, name, _, _ in _reference_cases(image_name))
    assert set(counts) == set(OPERATIONS)
    assert counts.total() == len(reference.load_json("augment/levels.json")["calls"])


@pytest.mark.parametrize(
    ("policy", "constants"),
    [("randaugment", RANDAUGMENT), ("autoaugment_v0", {"cutout": 100, "translate": 250})],
)
def test_levels_equal_the_official_arguments_exactly(policy, constants):
    for name, by_magnitude in reference.load_json("augment/levels.json")[policy].items():
        for magnitude, arguments in by_magnitude.items():
            level = float(magnitude) if policy == "randaugment" else int(magnitude)
            got = level_to_argument(name, level, **constants)
            assert got == (arguments[0] if arguments else 0.0), (name, magnitude)


def test_autoaugment_and_the_order_of_operations_are_the_official_ones():
    official = reference.load_json("augment/policy_v0.json")
    assert [[list(op) for op in pair] for pair in AUTOAUGMENT_V0] == official["policy"]
    assert list(OPERATIONS) == official["randaugment"]["ops"]


# Plain NumPy in float32, one rounding per operation: images and magnitudes that the stored arrays
# do not have.


def _blend(start, image, factor):
    start, image = start.astype(np.float32), image.astype(np.float32)
    return np.clip(start + np.float32(factor) * (image - start), 0, 255).astype(np.uint8)


def _grey(image):
    scaled = image.astype(np.float32) * np.float32(1 / 255)
    red, green, blue = (
        scaled[..., i] * np.float32(weight) for i, weight in enumerate((0.2989, 0.587, 0.114))
    )
    return ((red + green + blue) * np.float32(255.5)).astype(np.uint8)


def _affine(image, matrix):
    height, width, _ = image.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    source = []
    for a, b, c in np.asarray(matrix, np.float32).reshape(2, 3):
        position = (a * x + b * y + c).astype(np.float64)
        source.append((np.sign(position) * np.floor(np.abs(position) + 0.5)).astype(int))
    inside = (source[0] >= 0) & (source[0] < width) & (source[1] >= 0) & (source[1] < height)
    fetched = image[source[1].clip(0, height - 1), source[0].clip(0, width - 1)]
    return np.where(inside[..., None], fetched, 128).astype(np.uint8)


def _rotation(image, degrees):
    bottom, right = (np.float32(size - 1) for size in image.shape[:2])
    radians = float(np.float32(degrees) * np.float32(math.pi / 180))
    cosine, sine = np.float32(math.cos(radians)), np.float32(math.sin(radians))
    x = (right - (cosine * right - sine * bottom)) / np.float32(2)
    y = (bottom - (sine * right + cosine * bottom)) / np.float32(2)
    return [cosine, -sine, x, sine, cosine, y]


def _sharpness(image, factor):
    height, width, _ = image.shape
    kernel = np.asarray([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)
    total = np.zeros((height - 2, width - 2, 3), np.float32)
    for i in range(3):
        for j in range(3):
            total = total + image[i : i + height - 2, j : j + width - 2] * kernel[i, j]
    smooth = image.copy()
    smooth[1:-1, 1:-1] = total.clip(0, 255).astype(np.uint8)
    return _blend(smooth, image, factor)


def _autocontrast(image):
    result = image.copy()
    for channel in range(3):
        values = image[..., channel].astype(np.float32)
        low, high = values.min(), values.max()
        if high > low:
            scale = np.float32(255) / (high - low)
            stretched = values * scale + -low * scale
            result[..., channel] = stretched.clip(0, 255).astype(np.uint8)
    return result


def _equalize(image):
    result = image.copy()
    for channel in range(3):
        values = image[..., channel]
        counts = np.bincount(values.ravel(), minlength=256)
        step = (values.size - counts[counts.nonzero()[0][-1]]) // 255
        if step:
            table = np.concatenate([[0], ((np.cumsum(counts) + step // 2) // step)[:-1]])
            result[..., channel] = table.clip(0, 255)[values]
    return result


def _numpy_operation(name, image, level):
    argument = level_to_argument(name, level, **RANDAUGMENT)
    height, width, _ = image.shape
    wide = image.astype(int)
    match name:
        case "AutoContrast":
            return _autocontrast(image)
        case "Equalize":
            return _equalize(image)
        case "Invert":
            return 255 - image
        case "Posterize":
            shift = min((8 - argument) % 256, 7)
            return image >> shift << shift
        case "Solarize":
            return np.where(wide < argument % 256, image, 255 - image)
        case "SolarizeAdd":
            return np.where(wide < 128, np.minimum(wide + argument, 255), wide)
        case "Color":
            return _blend(_grey(image)[..., None], image, argument)
        case "Contrast":
            return _blend(np.uint8(min(height * width / 256, 255)), image, argument)
        case "Brightness":
            return _blend(np.uint8(0), image, argument)
        case "Sharpness":
            return _sharpness(image, argument)
        case "Rotate":
            return _affine(image, _rotation(image, argument))
        case "ShearX":
            return _affine(image, [1, argument, 0, 0, 1, 0])
        case "ShearY":
            return _affine(image, [1, 0, 0, argument, 1, 0])
        case "TranslateX":
            return _affine(image, [1, 0, argument, 0, 1, 0])
        case "TranslateY":
            return _affine(image, [1, 0, 0, 0, 1, argument])


def _photo_like(seed, height, width):
    """Smooth patches of a narrow range of values, with noise on some."""
    random = np.random.RandomState(seed)
    coarse = random.randint(20, 230, (height // 8 + 1, width // 8 + 1, 3))
    image = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    image = image + random.randint(-9, 10, image.shape) * (random.rand(height, width, 1) < 0.7)
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("implementation", ["map", "batch"])
def test_fractional_magnitudes_and_other_sizes_equal_plain_numpy(implementation):
    names = [name for name in OPERATIONS if name != "Cutout"]
    cases = [(name, level) for name in names for level in (0.7, 2.55, 4.95, 7.3, 12.85, 27.5)]
    image = _photo_like(seed=1, height=101, width=77)
    arguments = [operation_arguments(name, level, **RANDAUGMENT) for name, level in cases]
    got = _apply_each(image, [name for name, _ in cases], arguments, implementation=implementation)
    for (name, level), result in zip(cases, got, strict=True):
        expected = _numpy_operation(name, image, level)
        np.testing.assert_array_equal(result, expected, err_msg=f"{name} {level}")


def test_grey_equals_plain_numpy_for_every_third_colour():
    values = np.arange(0, 256, 3, dtype=np.uint8)
    colours = np.stack(np.meshgrid(values, values, values, indexing="ij"), axis=-1)
    image = colours.reshape(-1, len(values), 3)
    got = jax.jit(ops.color)(image, jnp.float32(0))
    np.testing.assert_array_equal(got, np.repeat(_grey(image)[..., None], 3, axis=-1))


def test_autocontrast_equals_plain_numpy_for_every_range():
    """Where a stretched value is nearly an integer, one wrong rounding moves it a level down."""
    stretch = jax.jit(jax.vmap(ops.autocontrast_table))
    for low in (0, 37, 100):
        highs = np.arange(low + 1, 256)
        images = np.zeros((len(highs), 1, 256, 3), np.uint8)
        for image, high in zip(images, highs, strict=True):
            image[0] = np.clip(np.arange(256), low, high)[:, None]
        tables = np.asarray(stretch(images))
        for image, table in zip(images, tables, strict=True):
            np.testing.assert_array_equal(table[0][image[0, :, 0]], _autocontrast(image)[0, :, 0])


def test_histogram_counts_every_pixel_of_every_channel():
    image = _photo_like(seed=2, height=33, width=50)
    expected = [np.bincount(image[..., i].ravel(), minlength=256) for i in range(3)]
    np.testing.assert_array_equal(jax.jit(ops.histogram)(image), expected)


def test_signed_operations_are_mirrored_by_a_negative_argument():
    """A shift to the left of the mirrored image is the mirrored shift to the right."""
    image = _photo_like(seed=3, height=40, width=40)
    for name in ("TranslateX", "Rotate"):
        arguments = operation_arguments(name, 2.0, **RANDAUGMENT)
        there, back = _apply_each(image, [name] * 2, [arguments, _negative(name, arguments)])
        mirrored = _apply_each(image[:, ::-1], [name], [arguments])[0, :, ::-1]
        # Rotation rounds half away from zero, which mirroring turns round at a few positions.
        assert np.mean(np.any(mirrored != back, axis=-1)) < 0.02
        assert np.mean(np.any(there != back, axis=-1)) > 0.2
    assert set(SIGNED) == set(GEOMETRIC)
