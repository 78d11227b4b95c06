"""The sorted table that a checkpoint's .index file is: LevelDB's format, uncompressed.

Follows LevelDB's doc/table_format.md: blocks of (key, value) with the common beginnings of keys
left out, each block with a masked CRC-32C; a block of block positions; a footer of 48 bytes.
Everything is verified. Damaged bytes raise ValueError.
"""

from collections.abc import Iterator

from effv2_jax.convert.crc32c import crc32c, masked
from effv2_jax.convert.wire import varint

_FOOTER = 48
MAGIC = bytes.fromhex("57fb808b247547db")
_TRAILER = 5  # one byte: how the block is compressed; four: its checksum
_UNCOMPRESSED, _SNAPPY = 0, 1


class UnsupportedError(ValueError):
    """The file is whole, but of a kind that is not read."""


def read_table(data: bytes) -> dict[bytes, bytes]:
    """Reads all entries of a table.

    Args:
        data: the whole file.

    Raises:
        ValueError: not a table, damaged or cut off.
        UnsupportedError: compressed.
    """
    if len(data) < _FOOTER or not data.endswith(MAGIC):
        raise ValueError(f"the end of an index is missing ({len(data)} bytes)")
    footer = data[-_FOOTER : -len(MAGIC)]
    at = 0
    handles = []
    for _ in range(2):
        offset, at = varint(footer, at)
        size, at = varint(footer, at)
        handles.append((offset, size))
    if any(footer[at:]):
        raise ValueError("its last bytes are damaged")
    body = data[:-_FOOTER]
    # The first block is of LevelDB's own additions (filters); read for its checksum.
    list(_entries(_block(body, *handles[0])))
    table: dict[bytes, bytes] = {}
    last = b""
    for _, handle in _entries(_block(body, *handles[1])):
        offset, at = varint(handle, 0)
        size, _ = varint(handle, at)
        for key, value in _entries(_block(body, offset, size)):
            if table and key <= last:
                raise ValueError("its keys are not in order")
            table[key] = value
            last = key
    return table


def _block(body: bytes, offset: int, size: int) -> bytes:
    """Returns the verified content of a block."""
    end = offset + size
    if end + _TRAILER > len(body):
        raise ValueError("a block lies behind its end")
    compression = body[end]
    stored = int.from_bytes(body[end + 1 : end + _TRAILER], "little")
    if masked(crc32c(body[offset : end + 1])) != stored:
        raise ValueError(f"the checksum of the block at byte {offset} is wrong")
    if compression == _SNAPPY:
        raise UnsupportedError("its index is compressed by snappy; TensorFlow itself never does so")
    if compression != _UNCOMPRESSED:
        raise UnsupportedError(f"its index is compressed in the unknown way {compression}")
    return body[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (key, value); a key repeats the first bytes of the one before."""
    if len(block) < 4:
        raise ValueError("a block is cut off")
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise ValueError("a block is cut off")
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at)
        added, at = varint(block, at)
        size, at = varint(block, at)
        if shared > len(key) or at + added + size > end:
            raise ValueError("a key or value is cut off")
        key = key[:shared] + block[at : at + added]
        at += added
        yield key, block[at : at + size]
        at += size
