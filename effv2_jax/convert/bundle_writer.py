"""Writes TensorFlow's checkpoint format without TensorFlow; `tensor_bundle` reads it.

One shard, name-based, as `tf.train.Saver` writes it. References: see `tensor_bundle` and
`sorted_table`.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from effv2_jax.atomic import replacing
from effv2_jax.convert.crc32c import crc32c, masked
from effv2_jax.convert.sorted_table import MAGIC
from effv2_jax.errors import UserError

_BLOCK = 4096  # bytes after which a block ends
_FLOAT = 1  # TensorFlow's number of float32
_HEADER = bytes.fromhex("08011a020801")  # one shard, little-endian, version 1


def write_bundle(prefix: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes PREFIX.data-00000-of-00001 and PREFIX.index.

    A file that was there stays until its successor is complete.

    Args:
        prefix: path without suffix.
        tensors: by name; float32.

    Raises:
        UserError: the files cannot be written, or a tensor is not float32.
    """
    wrong = [name for name, tensor in tensors.items() if tensor.dtype != np.float32]
    if wrong:
        raise UserError(f"{prefix}: not written: not float32: {', '.join(wrong)}")
    try:
        with replacing(f"{prefix}.data-00000-of-00001") as temporary:
            entries = {"": _HEADER}
            with temporary.open("wb") as file:
                for name in sorted(tensors, key=str.encode):
                    tensor = np.asarray(tensors[name], "<f4", order="C")
                    entries[name] = _entry(tensor, file.tell())
                    file.write(tensor)
            index = _table((name.encode(), value) for name, value in entries.items())
        with replacing(f"{prefix}.index") as temporary:
            temporary.write_bytes(index)
    except OSError as error:
        raise UserError(f"{prefix}: cannot be written: {error.strerror or error}") from None


def _entry(tensor: np.ndarray, offset: int) -> bytes:
    """BundleEntryProto: dtype = 1, shape = 2, offset = 4, size = 5, crc32c = 6; zeros left out."""
    shape = b"".join(_field(2, _field(1, size)) for size in tensor.shape)
    place = _field(4, offset) if offset else b""
    size = _field(5, tensor.nbytes) if tensor.nbytes else b""
    crc = struct.pack("<BI", 6 << 3 | 5, masked(crc32c(tensor.reshape(-1).view(np.uint8))))
    return _field(1, _FLOAT) + _field(2, shape) + place + size + crc


def _table(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The sorted table of entries that come in the order of their keys."""
    out = bytearray()
    handles = []
    for last, block in _blocks(entries):
        handles.append((last, _stored(out, block)))
    empty = _stored(out, struct.pack("<II", 0, 1))
    index = _stored(out, _block(handles))
    return bytes(out) + (empty + index).ljust(40, b"\0") + MAGIC


def _blocks(entries: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Yields (last key, content) of the blocks."""
    waiting, size = [], 0
    for key, value in entries:
        waiting.append((key, value))
        size += len(key) + len(value)
        if size >= _BLOCK:
            yield key, _block(waiting)
            waiting, size = [], 0
    if waiting:
        yield waiting[-1][0], _block(waiting)


def _block(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block in which every key is written in full: each one is a place to start from."""
    out, starts = bytearray(), []
    for key, value in entries:
        starts.append(len(out))
        out += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
    return bytes(out) + struct.pack(f"<{len(starts) + 1}I", *starts, len(starts))


def _stored(out: bytearray, block: bytes) -> bytes:
    """Appends a block with its trailer; returns where it is."""
    handle = _varint(len(out)) + _varint(len(block))
    content = block + b"\0"  # uncompressed
    out += content + struct.pack("<I", masked(crc32c(content)))
    return handle


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
