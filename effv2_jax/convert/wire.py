"""The wire format of protocol buffers, read generically: numbers of fields and their raw values.

Follows https://protobuf.dev/programming-guides/encoding. Damaged bytes raise ValueError.
"""

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Reads an unsigned number of up to 64 bits; returns it and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                raise ValueError("a number is longer than it is written")
            return value, at
    raise ValueError("a number has more than 64 bits")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of every field of a message, in order.

    Numbers are not interpreted: signed ones are as their 64-bit complement. Strings and messages
    are bytes.
    """
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            value = struct.unpack("<I" if size == 4 else "<Q", _take(data, at, size))[0]
            at += size
        elif kind == _LENGTH:
            size, at = varint(data, at)
            value = _take(data, at, size)
            at += size
        else:
            raise ValueError(f"a field has the unknown kind {kind}")
        yield tag >> 3, value


def message(value: int | bytes) -> bytes:
    """Returns the bytes of a field that must be a string or message."""
    if not isinstance(value, bytes):
        raise ValueError("a number where a message was expected")
    return value


def number(value: int | bytes) -> int:
    """Returns the value of a field that must be a number."""
    if not isinstance(value, int):
        raise ValueError("a message where a number was expected")
    return value


def _take(data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        raise ValueError("a field is cut off")
    return data[at : at + size]
