"""The kinds of preprocessing, above all those of timm and torchvision."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from effv2_jax.data.kinds import KINDS, describe, get_kind, is_kind, kind_of
from effv2_jax.data.preprocess import (
    CropSampling,
    evaluation_box,
    evaluation_image,
    normalization,
    training_image,
)
from effv2_jax.errors import UserError
from tests.data import pictures

PILLOW = ("pillow-bicubic-0.875-imagenet", "pillow-bilinear-0.941176-half", "pillow-bicubic-1-half",
          "pillow-bilinear-squash1-imagenet")  # fmt: skip


@pytest.mark.parametrize("name", [*KINDS, *PILLOW])
@pytest.mark.parametrize("size", [224, 384])
def test_what_a_weights_file_says_gives_the_kind_again(name, size):
    assert is_kind(name)
    kind = kind_of(describe(name, size), image_size=size)
    assert (kind.name, kind.mean, kind.std) == (name, get_kind(name).mean, get_kind(name).std)
    photo = pictures.photograph(60, 80)
    np.testing.assert_array_equal(
        evaluation_image(photo, size=48, kind=get_kind(name)),
        evaluation_image(photo, size=48, kind=kind_of(describe(name, 48), image_size=48)),
    )


@pytest.mark.parametrize(
    "name", ["pillow", "pillow-nearest-1-half", "pillow-bicubic-0-half", "pillow-bicubic-1.5-half",
             "pillow-bicubic-0.0-half", "pillow-bicubic-1-tf", "pillow-bicubic-1-half "],
)  # fmt: skip
def test_names_that_are_no_kinds_are_refused(name):
    assert not is_kind(name)
    with pytest.raises(UserError, match=r"or like pillow-bicubic-0\.875-imagenet"):
        get_kind(name)


def test_a_file_that_contradicts_its_kind_is_refused():
    said = describe(PILLOW[0], 224)
    with pytest.raises(UserError, match=r"crop is '0.5', expected 0.875"):
        kind_of({**said, "crop": "0.5"}, image_size=224)
    with pytest.raises(UserError, match="interpolation is 'nearest'"):
        kind_of({**said, "interpolation": "nearest"}, image_size=224)


def test_own_mean_and_deviation_win():
    said = {**describe("v1", 224), "mean": [0.0] * 3, "std": [255.0] * 3}
    assert kind_of(said, image_size=224).std == (255.0,) * 3


def test_normalisation_is_by_imagenet_or_by_a_half():
    mean, std = normalization("pillow-bicubic-0.875-imagenet")
    np.testing.assert_allclose(mean / 255, [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(std / 255, [0.229, 0.224, 0.225], rtol=1e-6)
    np.testing.assert_array_equal(normalization("pillow-bicubic-1-half"), np.full((2, 3), 127.5))


@pytest.mark.parametrize(("height", "width"), [(100, 143), (143, 100), (97, 97), (60, 61)])
def test_the_shorter_side_is_resized_then_the_centre_is_cut(height, width):
    photo = pictures.photograph(width, height)
    shown = evaluation_image(photo, size=56, kind=get_kind("pillow-bicubic-0.875-imagenet"))
    scale = 64 / min(height, width)
    scaled = (int(width * scale) if width > height else 64,
              int(height * scale) if height > width else 64)  # fmt: skip
    resized = np.asarray(Image.fromarray(photo).resize(scaled, Image.Resampling.BICUBIC))
    top, left = round((scaled[1] - 56) / 2), round((scaled[0] - 56) / 2)
    np.testing.assert_array_equal(shown, resized[top : top + 56, left : left + 56])
    assert shown.dtype == np.float32


def test_squash_shows_the_whole_picture():
    photo = pictures.photograph(80, 50)
    shown = evaluation_image(photo, size=32, kind=get_kind("pillow-bilinear-squash1-half"))
    expected = Image.fromarray(photo).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(shown, np.asarray(expected))


def test_the_window_is_the_part_of_the_picture_that_is_shown():
    # 100 x 200, resized to 64 x 128 of which the centre 56 x 56: 87.5 pixels of the original.
    box = evaluation_box(100, 200, size=56, kind=get_kind("pillow-bicubic-0.875-imagenet"))
    assert (box.top, box.left) == (6, 56)
    assert (box.height, box.width) == (88, 88)
    whole = evaluation_box(100, 200, size=56, kind=get_kind("pillow-bicubic-squash1-half"))
    assert (whole.height, whole.width) == (100, 200)


def test_training_resizes_the_crop_by_pillow():
    photo = pictures.photograph(90, 60)
    image = training_image(
        photo, size=40, rng=np.random.default_rng(0), kind=get_kind(PILLOW[0]), sampling=None
    )
    expected = Image.fromarray(photo).resize((40, 40), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(image, np.asarray(expected))


@pytest.mark.parametrize("name", PILLOW)
def test_thin_pictures_survive(name):
    for shape in ((1, 1), (1, 300), (3, 2000), (2000, 1)):
        photo = pictures.photograph(shape[1], shape[0])
        kind = get_kind(name)
        assert evaluation_image(photo, size=24, kind=kind).shape == (24, 24, 3)
        evaluation_box(*shape, size=24, kind=kind)
        image = training_image(
            photo, size=24, rng=np.random.default_rng(1), kind=kind, sampling=CropSampling()
        )
        assert image.shape == (24, 24, 3)


def test_kinds_are_read_without_numpy():
    code = "import sys, effv2_jax.data.kinds; print({'jax', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (301, 300), (720, 1280)])
@pytest.mark.parametrize(
    ("kind", "size", "resize"),
    [
        ("pillow-bicubic-0.875-imagenet", 224, 256),
        ("pillow-bilinear-0.941176-imagenet", 240, 255),
        ("pillow-bicubic-0.989583-imagenet", 380, 384),
        ("pillow-bilinear-1-imagenet", 384, 384),
        ("pillow-bicubic-1-half", 480, 480),
    ],
)
def test_evaluation_equals_torchvision(kind, size, resize, height, width):
    pytest.importorskip("torchvision", reason="compares with torchvision")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if kind.endswith("half") else {}
    mode = InterpolationMode.BICUBIC if "bicubic" in kind else InterpolationMode.BILINEAR
    theirs = ImageClassification(crop_size=size, resize_size=resize, interpolation=mode, **half)
    photo = pictures.photograph(width, height)
    mean, std = normalization(kind)
    ours = (evaluation_image(photo, size=size, kind=get_kind(kind)) - mean) / std
    expected = theirs(Image.fromarray(photo)).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(ours, expected, atol=2e-6)  # a pixel is 0.008


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (301, 300)])
@pytest.mark.parametrize(
    ("kind", "size", "crop", "mode"),
    [
        ("pillow-bicubic-0.875-imagenet", 224, 0.875, "center"),
        ("pillow-bicubic-0.89-imagenet", 260, 0.89, "center"),
        ("pillow-bicubic-0.904-imagenet", 300, 0.904, "center"),
        ("pillow-bicubic-1-half", 384, 1.0, "center"),
        ("pillow-bicubic-squash0.9-half", 300, 0.9, "squash"),
        ("pillow-bicubic-squash1-half", 480, 1.0, "squash"),
    ],
)
def test_evaluation_equals_timm(kind, size, crop, mode, height, width):
    data = pytest.importorskip("timm.data", reason="compares with timm")
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if kind.endswith("half") else {}
    theirs = data.create_transform(
        (3, size, size), interpolation="bicubic", crop_pct=crop, crop_mode=mode, **half
    )
    photo = pictures.photograph(width, height)
    mean, std = normalization(kind)
    ours = (evaluation_image(photo, size=size, kind=get_kind(kind)) - mean) / std
    expected = theirs(Image.fromarray(photo)).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
