"""Writes files as torch.save does, byte by byte, and such as it never would."""

import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

REBUILD = "torch._utils _rebuild_tensor_v2"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module_and_name: str) -> bytes:
    return b"c" + module_and_name.replace(" ", "\n").encode() + b"\n"


def items(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + items(*arguments) + b"R"


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key.replace("__", ".")) + v for key, v in values.items()) + b"u"


def tensor(
    key="0", *, size=6, kind="FloatStorage", offset=0, shape=(6,), strides=(1,), view=b""
) -> bytes:
    storage = items(
        text("storage"), name(f"torch {kind}"), text(key), text("cpu"), number(size), view
    )
    return call(
        REBUILD, storage + b"Q", number(offset), items(*map(number, shape)),
        items(*map(number, strides)), b"\x89", call("collections OrderedDict"),
    )  # fmt: skip


def save(
    path: Path,
    body: bytes,
    storages: dict[str, np.ndarray] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Writes the archive; by default storage "0" has the six numbers 0, 1 ... 5."""
    storages = {"0": np.arange(6, dtype=np.float32)} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        for key, numbers in storages.items():
            archive.writestr(f"archive/data/{key}", numbers.tobytes())
    return path


def save_legacy(
    path: Path,
    body: bytes,
    *,
    protocol: int = 2,
    version: object = 1001,
    system: object = None,
    keys: object = ("0",),
    counts: tuple[int, ...] = (6,),
) -> Path:
    """Writes the layout before PyTorch 1.6; every storage has the six numbers 0, 1 ... 5."""
    system = {"little_endian": True, "protocol_version": version} if system is None else system
    start = [pickle.dumps(each, protocol) for each in (0x1950A86A20F9469CFC6C, version, system)]
    keys = list(keys) if isinstance(keys, tuple) else keys
    numbers = np.arange(6, dtype="<f4").tobytes()
    storages = [struct.pack("<q", count) + numbers for count in counts]
    parts = (*start, b"\x80\x02" + body + b".", pickle.dumps(keys, protocol), *storages)
    path.write_bytes(b"".join(parts))
    return path
