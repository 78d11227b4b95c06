import json

import numpy as np
import pytest
from PIL import Image

from effv2_jax.data import decode_fast
from effv2_jax.data.decode import CorruptImageError, EncodedImage, as_rgb, decode
from effv2_jax.errors import UserError
from tests import reference
from tests.data import pictures

PHOTO = pictures.photograph()
GREY = PHOTO[:, :, 1]
PALETTED = Image.fromarray(PHOTO).quantize(64)
COLOURS = np.asarray(PALETTED.getpalette("RGB"), np.uint8).reshape(-1, 3)[np.asarray(PALETTED)]


def _rgba() -> Image.Image:
    alpha = np.linspace(0, 255, PHOTO.shape[1]).astype(np.uint8)
    alpha = np.broadcast_to(alpha, PHOTO.shape[:2])
    return Image.fromarray(np.dstack([PHOTO, alpha]), "RGBA")


def _animation() -> bytes:
    frames = [Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)]
    return pictures.encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], quality=95)


# name: (file, picture expected, largest mean deviation of a channel, largest of a pixel)
GOOD = {
    "rgb.png": (pictures.encode(PHOTO), PHOTO, 0, 0),
    "rgba.png": (pictures.encode(_rgba()), PHOTO, 0, 0),
    "grey.png": (pictures.encode(GREY), GREY, 0, 0),
    "grey_alpha.png": (pictures.encode(Image.fromarray(GREY).convert("LA")), GREY, 0, 0),
    "grey16.png": (pictures.png16(GREY.astype(np.uint16) * 257), GREY, 0, 0),
    "rgb16.png": (pictures.png16(PHOTO.astype(np.uint16) * 257), PHOTO, 0, 0),
    "bilevel.png": (
        pictures.encode(Image.fromarray(GREY > 100)),
        np.where(GREY > 100, 255, 0).astype(np.uint8),
        0,
        0,
    ),
    "palette.png": (pictures.encode(PALETTED), COLOURS, 0, 0),
    "palette_transparent.png": (pictures.encode(PALETTED, transparency=3), COLOURS, 0, 0),
    "png_inside.JPEG": (pictures.encode(PHOTO), PHOTO, 0, 0),
    "gif.gif": (pictures.encode(PALETTED, "GIF"), COLOURS, 0, 0),
    "animation.webp": (_animation(), PHOTO, 2, 20),
    "webp.webp": (pictures.encode(PHOTO, "WEBP", quality=95), PHOTO, 2, 20),
    "bmp.bmp": (pictures.encode(PHOTO, "BMP"), PHOTO, 0, 0),
    "photo.jpg": (pictures.jpeg(PHOTO), PHOTO, 1, 12),
    "progressive.jpg": (pictures.jpeg(PHOTO, progressive=True), PHOTO, 1, 12),
    "grey.jpg": (pictures.jpeg(GREY), GREY, 1, 12),
    "cmyk.jpg": (pictures.jpeg(Image.fromarray(PHOTO).convert("CMYK")), PHOTO, 1, 12),
    "one_pixel.png": (pictures.encode(PHOTO[:1, :1]), PHOTO[:1, :1], 0, 0),
    "thin.png": (pictures.encode(PHOTO[:2]), PHOTO[:2], 0, 0),
}


@pytest.mark.parametrize("name", GOOD)
def test_awkward_files_decode_to_the_picture_that_was_stored(name):
    data, expected, mean_deviation, deviation = GOOD[name]
    expected = np.broadcast_to(expected.reshape(*expected.shape[:2], -1), (*expected.shape[:2], 3))
    pixels = decode(data, name=name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.mean(axis=(0, 1)).max() <= mean_deviation
    assert difference.max() <= deviation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    data = pictures.jpeg(pictures.stored_for(PHOTO, orientation), orientation=orientation)
    image = EncodedImage(data, name="x.jpg")
    assert (image.height, image.width) == PHOTO.shape[:2]
    # 12: JPEG at quality 95; a wrong orientation is off by more than 100.
    np.testing.assert_allclose(image.pixels().astype(int), PHOTO, atol=12)


# An orientation that is the text "abc": Pillow hands it on.
TEXT_ORIENTATION = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff", TEXT_ORIENTATION])
def test_damaged_metadata_do_not_spoil_a_good_picture(exif):
    expected = decode(pictures.jpeg(PHOTO), name="x.jpg")
    np.testing.assert_array_equal(decode(pictures.jpeg(PHOTO, exif=exif), name="x.jpg"), expected)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_means_upright(value):
    data = pictures.jpeg(PHOTO, orientation=value)
    np.testing.assert_allclose(decode(data, name="x.jpg").astype(int), PHOTO, atol=12)


def test_sixteen_bits_are_rounded_to_eight():
    values = np.array([[0, 128, 129, 257, 65535, 65406, 65407]], np.uint16)
    assert decode(pictures.png16(values), name="x.png")[0, :, 0].tolist() == [
        0,
        0,
        1,
        1,
        255,
        254,
        255,
    ]


BROKEN = {
    "truncated.jpg": pictures.jpeg(PHOTO)[:700],
    "truncated.png": pictures.encode(PHOTO)[:700],
    "text.jpg": b"<html>404 Not Found</html>",
    "empty.jpg": b"",
    "huge.png": pictures.decompression_bomb(),
    "header_only.jpg": pictures.jpeg(PHOTO)[:100],
    "float.tiff": pictures.encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name):
    with pytest.raises(CorruptImageError, match=f"^folder/{name}: cannot decode") as caught:
        decode(BROKEN[name], name=f"folder/{name}")
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)


def test_an_empty_file_is_called_empty():
    with pytest.raises(CorruptImageError, match=r"\(the file is empty\)"):
        decode(b"", name="x.jpg")


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    outcomes = set()
    for data in (pictures.jpeg(PHOTO), pictures.encode(PHOTO), GOOD["webp.webp"][0]):
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(len(data), size=3):
                damaged[position] ^= int(rng.integers(1, 256))
            try:
                outcomes.add(decode(bytes(damaged), name="x").dtype.name)
            except CorruptImageError:
                outcomes.add("corrupt")
    assert outcomes == {"uint8", "corrupt"}


def test_reduced_decoding_gives_the_same_picture_smaller():
    photo = pictures.photograph(203, 150)
    image = EncodedImage(pictures.jpeg(photo), name="x.jpg", decoder="pillow_draft")
    assert image.reducible
    half = image.pixels(2)
    assert half.shape == (75, 102, 3)
    # The picture is smooth, so every pixel of the half is the average of four.
    average = photo[:, :202].reshape(75, 2, 101, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(half[:, :101], average, atol=6)
    turned = pictures.jpeg(pictures.stored_for(photo, 6), orientation=6)
    turned = EncodedImage(turned, name="x.jpg", decoder="pillow_draft")
    np.testing.assert_allclose(turned.pixels(2)[:, :101].astype(int), average, atol=6)


def test_only_jpeg_and_only_the_draft_decoder_reduce():
    assert not EncodedImage(pictures.encode(PHOTO), name="x", decoder="pillow_draft").reducible
    assert not EncodedImage(pictures.jpeg(PHOTO), name="x").reducible


@pytest.mark.parametrize("name", ["china", "flower"])
def test_pillow_is_within_the_known_distance_of_tensorflow(name):
    # TensorFlow's decoder uses the fast integer DCT: at most 6 of 255, 1.03 on average.
    data = (reference.DATA / "preprocess" / f"{name}.jpg").read_bytes()
    expected = reference.load_npz("preprocess/preprocess.npz")[f"{name}_jpg/decode_image"]
    difference = np.abs(decode(data, name=name).astype(int) - expected)
    assert difference.max() <= 6
    assert difference.mean() < 1.1


@pytest.mark.parametrize("name", ["china", "flower"])
def test_the_fast_decoder_equals_tensorflow_bit_by_bit(name):
    pytest.importorskip("simplejpeg")
    data = (reference.DATA / "preprocess" / f"{name}.jpg").read_bytes()
    expected = reference.load_npz("preprocess/preprocess.npz")[f"{name}_jpg/decode_image"]
    np.testing.assert_array_equal(decode(data, name=name, decoder="simplejpeg"), expected)


@pytest.mark.parametrize("name", [*GOOD, *BROKEN])
def test_the_fast_decoder_keeps_every_guarantee(name):
    pytest.importorskip("simplejpeg")
    if name in BROKEN:
        with pytest.raises(CorruptImageError, match=name):
            decode(BROKEN[name], name=name, decoder="simplejpeg")
        return
    data = GOOD[name][0]
    slow = decode(data, name=name).astype(int)
    np.testing.assert_allclose(decode(data, name=name, decoder="simplejpeg"), slow, atol=6)


def test_a_missing_fast_decoder_is_explained(monkeypatch):
    monkeypatch.setattr(decode_fast.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fast-decode"):
        decode_fast.require()


def test_arrays_become_rgb():
    assert as_rgb(GREY, name="x").shape == PHOTO.shape
    assert as_rgb(GREY[:, :, None], name="x").shape == PHOTO.shape
    assert as_rgb(PHOTO, name="x") is PHOTO
    with pytest.raises(UserError, match=r"^x: found an array float32\[64, 96\]"):
        as_rgb(GREY.astype(np.float32), name="x")
    with pytest.raises(UserError, match=r"uint8\[64, 96, 4\]"):
        as_rgb(np.asarray(_rgba()), name="x")


@pytest.mark.real_data
def test_real_awkward_files_decode_to_their_expected_mean():
    folder = pictures.real_data() / "awkward"
    facts = json.loads((folder / "expected.json").read_text())["files"]
    assert {path.name for path in (folder / "good").iterdir()} == set(facts)
    for name, fact in facts.items():
        pixels = decode((folder / "good" / name).read_bytes(), name=name)
        size = fact.get("size_upright") or fact["size"]
        assert pixels.shape == (size[1], size[0], 3), name
        mean = pixels.mean(axis=(0, 1))
        assert np.abs(mean - fact["rgb_mean"]).max() <= fact["tolerance"] + 0.005, name
        if quarter := fact.get("upright_top_left_quarter_rgb_mean"):
            mean = pixels[: size[1] // 2, : size[0] // 2].mean(axis=(0, 1))
            assert np.abs(mean - quarter).max() <= fact["tolerance"], name


@pytest.mark.real_data
def test_real_broken_files_are_named():
    files = sorted((pictures.real_data() / "awkward" / "broken").iterdir())
    assert len(files) == 5
    for path in files:
        with pytest.raises(CorruptImageError, match=path.name):
            decode(path.read_bytes(), name=str(path))
