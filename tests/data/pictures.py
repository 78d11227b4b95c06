"""Pictures made for the tests: one synthetic photograph and the awkward ways to store it."""

import io
import os
import pathlib
import zlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from effv2_jax.config import base_config

WIDTH, HEIGHT = 96, 64


def photograph(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture without symmetry: uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    phase = np.random.default_rng(seed).uniform(0, 6, size=3)
    channels = [
        140 + 80 * np.sin(3 * x + phase[0]) - 30 * y,
        100 + 60 * np.cos(4 * y + phase[1]) + 40 * x,
        60 + 50 * np.sin(5 * x * y + phase[2]),
    ]
    return np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8)


def encode(array: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(array: np.ndarray, *, orientation: int | None = None, **options) -> bytes:
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    return encode(array, "JPEG", quality=95, **options)


def stored_for(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a viewer turns into `upright` when the EXIF tag says `orientation`."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),  # the viewer turns it clockwise by 90 degrees
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(undo[orientation](upright))


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return len(data).to_bytes(4, "big") + kind + data + crc.to_bytes(4, "big")


def png16(array: np.ndarray) -> bytes:
    """A PNG with 16 bits per channel; `array` uint16 [H, W] or [H, W, 3]. Pillow writes no RGB."""
    height, width = array.shape[:2]
    colour = 2 if array.ndim == 3 else 0
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    body = _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + _png_chunk(b"IEND", b"")


def decompression_bomb() -> bytes:
    """A PNG of 67 bytes whose header claims 60000x60000 pixels."""
    size = (60000).to_bytes(4, "big")
    header = _png_chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + _png_chunk(b"IDAT", b"") + _png_chunk(b"IEND", b"")


def write_tree(root: pathlib.Path, tree: dict[str, bytes]) -> pathlib.Path:
    """Writes {relative path: content} below `root`."""
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def class_folders(root: pathlib.Path, counts: dict[str, int]) -> pathlib.Path:
    """Writes `count` different small PNGs into each folder; the first pixel tells the number."""
    number = 0
    for folder, count in counts.items():
        for i in range(count):
            array = photograph(14, 12, seed=number)
            array[0, 0] = number % 256
            write_tree(root, {f"{folder}/{i:03d}.png": encode(array)})
            number += 1
    return root


def data_config(source: str = "digits", directory: object = "", **changes) -> ConfigDict:
    """The section `data` of a config for a source, read in this thread."""
    data = base_config().data
    data.source, data.dir, data.workers, data.threads = source, str(directory), 0, 0
    data.update(changes)
    return data


def labels_of(source) -> list:
    return [source[i].label for i in range(len(source))]


def names_of(source) -> list[str]:
    return [source[i].name for i in range(len(source))]


def real_data() -> pathlib.Path:
    """The folder of real photographs, or a skip that says how to get it."""
    folder = os.environ.get("EFFV2_DATA")
    if not folder:
        pytest.skip("REAL PHOTOGRAPHS NOT TESTED: set EFFV2_DATA to a folder with awkward/ etc.")
    return pathlib.Path(folder)
