"""TensorFlow's checkpoint format, read without TensorFlow.

A checkpoint is an index, a sorted table of tensor name -> `Entry`, and shards, files of the
tensors' bytes one after the other. Every byte that is used is verified by its checksum.

Follows tensorflow/core/util/tensor_bundle (tensor_bundle.h) and
tensorflow/core/protobuf/tensor_bundle.proto.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import ml_dtypes
import numpy as np

from effv2_jax.convert.checkpoint_files import CheckpointFiles, Extent
from effv2_jax.convert.crc32c import crc32c, masked
from effv2_jax.convert.sorted_table import UnsupportedError, read_table
from effv2_jax.convert.wire import fields, message, number, varint
from effv2_jax.errors import UserError

_CHUNK = 1 << 22  # bytes read at once where only the checksum is wanted
_LISTED = 4  # damaged tensors that are named

# tensorflow/core/framework/types.proto
_STRING = 7
_DTYPES = {
    1: np.dtype("float32"), 2: np.dtype("float64"), 3: np.dtype("int32"), 4: np.dtype("uint8"),
    5: np.dtype("int16"), 6: np.dtype("int8"), 9: np.dtype("int64"), 10: np.dtype("bool"),
    14: np.dtype(ml_dtypes.bfloat16), 17: np.dtype("uint16"), 19: np.dtype("float16"),
    22: np.dtype("uint32"), 23: np.dtype("uint64"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor is and what it is.

    Attributes:
      dtype: TensorFlow's number of the type.
      shape: of the tensor.
      shard: number of the file.
      offset: first byte in the shard.
      size: bytes.
      crc: masked checksum of the bytes.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape), the dtype as NumPy writes it."""
        known = {_STRING: "string", **{key: str(dtype) for key, dtype in _DTYPES.items()}}
        return known.get(self.dtype, f"TensorFlow's type {self.dtype}"), self.shape


class Bundle:
    """An open checkpoint.

    Attributes:
      entries: tensor name -> `Entry`, in the order of names.
      num_shards: files that hold the tensors.
      where: the checkpoint, for messages.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        """Reads and verifies the index; the shards must be there and long enough.

        Raises:
          UserError: damaged, cut off, or not a checkpoint.
        """
        self.where = files.where
        try:
            table = read_table(files.index)
            self.num_shards, self.entries = _parse(table)
        except UnsupportedError as error:
            raise UserError(f"{self.where}: cannot be read: {error}") from None
        except ValueError as error:
            raise UserError(
                f"{self.where}.index: damaged: {error}; copy or download the checkpoint again"
            ) from None
        self._extents = [files.shard(i, self.num_shards) for i in range(self.num_shards)]
        self._check_lengths()

    def read(self, wanted: Collection[str]) -> dict[str, np.ndarray]:
        """Reads tensors, in the order in which they lie, and verifies these and all others.

        Args:
          wanted: names of `entries`.

        Raises:
          UserError: the bytes of some tensor, wanted or not, are not those that were written; names
            them.
        """
        tensors, damaged = {}, []
        order = sorted(self.entries, key=lambda name: _position(self.entries[name]))
        for name in order:
            entry = self.entries[name]
            extent = self._extents[entry.shard]
            if name in wanted and entry.dtype in _DTYPES:
                tensor = np.empty(entry.shape, _DTYPES[entry.dtype])
                data = tensor.reshape(-1).view(np.uint8)
                extent.read_into(data, entry.offset)
                whole = masked(crc32c(data)) == entry.crc
                tensors[name] = tensor
            elif entry.dtype == _STRING:
                whole = _strings(extent.read(entry.offset, entry.size), entry) is not None
            else:
                whole = _stream_crc(extent, entry) == entry.crc
            if not whole:
                damaged.append(name)
        if damaged:
            more = f" and {len(damaged) - _LISTED} more" if len(damaged) > _LISTED else ""
            raise UserError(
                f"{self.where}: damaged: wrong checksum of {', '.join(damaged[:_LISTED])}{more}; "
                "copy or download the checkpoint again"
            )
        return tensors

    def read_string(self, name: str) -> bytes:
        """Reads a tensor that is one string.

        Raises:
          UserError: damaged.
        """
        entry = self.entries[name]
        extent = self._extents[entry.shard]
        found = _strings(extent.read(entry.offset, entry.size), entry)
        if found is None or len(found) != 1:
            raise UserError(
                f"{self.where}: damaged: {name} is not one whole string; "
                "copy or download the checkpoint again"
            )
        return found[0]

    def _check_lengths(self) -> None:
        problems = []
        for shard, extent in enumerate(self._extents):
            ends = [e.offset + e.size for e in self.entries.values() if e.shard == shard]
            if extent.size < max(ends, default=0):
                problems.append(f"{extent.name} has {extent.size:,} bytes of {max(ends):,}")
        if problems:
            raise UserError(
                f"{self.where}: cut off: {'; '.join(problems)}; copy or download it again"
            )


def _position(entry: Entry) -> tuple[int, int]:
    return entry.shard, entry.offset


def _stream_crc(extent: Extent, entry: Entry) -> int:
    crc, at, end = 0, entry.offset, entry.offset + entry.size
    while at < end:
        chunk = extent.read(at, min(_CHUNK, end - at))
        crc = crc32c(chunk, crc)
        at += len(chunk)
    return masked(crc)


def _parse(table: Mapping[bytes, bytes]) -> tuple[int, dict[str, Entry]]:
    """Returns the number of shards and the entries; the header has the empty key."""
    if b"" not in table:
        raise ValueError("it has no header: not the index of a checkpoint")
    shards = _parse_header(table[b""])
    entries = {}
    for key, value in table.items():
        if key:
            name = key.decode(errors="backslashreplace")
            entries[name] = _parse_entry(name, value, shards)
    return shards, entries


def _parse_header(data: bytes) -> int:
    """BundleHeaderProto: num_shards = 1, endianness = 2 (0: little), version = 3."""
    found = {1: 1, 2: 0} | {field: value for field, value in fields(data) if field in (1, 2)}
    if number(found[2]) != 0:
        raise UnsupportedError("it was written on a big-endian machine; save it on another one")
    if not 1 <= number(found[1]) <= 99_999:
        raise ValueError(f"it says that there are {found[1]} shards")
    return number(found[1])


def _parse_entry(name: str, data: bytes, shards: int) -> Entry:
    """BundleEntryProto: dtype = 1, shape, shard_id, offset, size, crc32c, slices = 7."""
    values = dict.fromkeys((1, 3, 4, 5, 6), 0)
    shape: tuple[int, ...] = ()
    for field, value in fields(data):
        if field == 2:
            shape = _parse_shape(message(value))
        elif field == 7:
            raise UnsupportedError(
                f"{name} is stored in slices (a partitioned variable); save it unpartitioned"
            )
        elif field in values:
            values[field] = number(value)
    entry = Entry(
        dtype=values[1], shape=shape, shard=values[3], offset=values[4], size=values[5],
        crc=values[6],
    )  # fmt: skip
    dtype = _DTYPES.get(entry.dtype)
    if dtype is not None and entry.size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} is {dtype}{list(shape)} but has {entry.size} bytes")
    if entry.shard >= shards:
        raise ValueError(f"{name} is in shard {entry.shard} of {shards}")
    return entry


def _parse_shape(data: bytes) -> tuple[int, ...]:
    """TensorShapeProto: dim = 2 {size = 1}."""
    shape = []
    for field, value in fields(data):
        if field == 2:
            sizes = [number(size) for inner, size in fields(message(value)) if inner == 1]
            shape.append(sizes[-1] if sizes else 0)
    return tuple(shape)


def _strings(data: bytes, entry: Entry) -> Sequence[bytes] | None:
    """Returns the strings of a tensor, or None if they are damaged.

    Stored are the lengths, their checksum, the strings; the entry's checksum is of the lengths as
    32-bit numbers (64-bit where they need it), of the stored checksum, and of the strings.
    """
    try:
        at, lengths, crc = 0, [], 0
        for _ in range(math.prod(entry.shape)):
            length, at = varint(data, at)
            lengths.append(length)
            crc = crc32c(length.to_bytes(4 if length < 1 << 32 else 8, "little"), crc)
    except ValueError:
        return None
    stored = data[at : at + 4]
    if int.from_bytes(stored, "little") != masked(crc):
        return None
    crc = crc32c(data[at + 4 :], crc32c(stored, crc))
    at += 4
    if masked(crc) != entry.crc or at + sum(lengths) != len(data):
        return None
    out = []
    for length in lengths:
        out.append(data[at : at + length])
        at += length
    return out
