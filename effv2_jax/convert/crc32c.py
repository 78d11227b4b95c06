"""The CRC-32C checksum in NumPy, some hundred megabytes a second.

A checksum byte by byte is a long chain of dependent steps. Here the data is a table of many
columns, and whole rows are folded: the checksum is a polynomial over GF(2) modulo a fixed one, so
that a row times x^(bits of a row) is added to the row below by two table look-ups per 32-bit word.
One row remains; halves of it are folded in the same way down to a single word.

Definition: RFC 3720 appendix B.4 (Castagnoli's polynomial, reflected). The masked form, which
LevelDB and TensorFlow store, is that of LevelDB's doc/log_format.md and util/crc32c.h.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected: bit 31 is x^0
_ALL_ONES = 0xFFFFFFFF
_MASK_DELTA = 0xA282EAD8

_COLUMNS = 1 << 14  # 32-bit words of a row; the row and its tables stay in the second cache
_MIN_WORDS = 64  # below that byte by byte is faster


def crc32c(data: bytes | bytearray | memoryview | np.ndarray, crc: int = 0) -> int:
    """Returns the checksum of the bytes; `crc` is that of what comes before them.

    Args:
      data: any contiguous bytes.
      crc: checksum of the preceding bytes, 0 at the start.
    """
    data = memoryview(data).cast("B")
    state = crc ^ _ALL_ONES
    words = np.frombuffer(data, "<u4", len(data) // 4)
    rows = words.size // _COLUMNS
    if rows > 1:
        state = _fold(words[: rows * _COLUMNS].reshape(rows, _COLUMNS), state)
        words = words[rows * _COLUMNS :]
    if words.size >= _MIN_WORDS:
        # Zeros before the first word change nothing: the state enters with that word.
        row = np.zeros(1 << (words.size - 1).bit_length(), np.uint32)
        row[-words.size :] = words
        row[-words.size] ^= np.uint32(state)
        state = _fold_row(row)
        words = words[:0]
    table = _byte_table()
    for byte in bytes(data[len(data) - len(data) % 4 - words.nbytes :]):
        state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ _ALL_ONES


def masked(crc: int) -> int:
    """Returns the checksum as it is stored beside the data that it covers."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & _ALL_ONES


def _fold(words: np.ndarray, state: int) -> int:
    """Returns the state after the words [rows, columns], columns a power of two."""
    row = words[0].astype(np.uint32)
    row[0] ^= np.uint32(state)
    for below in words[1:]:
        row = _shifted(row, row.size) ^ below
    return _fold_row(row)


def _fold_row(row: np.ndarray) -> int:
    """Returns the state after the words, a power of two many; the first has the state in it."""
    while row.size > 1:
        half = row.size // 2
        row = _shifted(row[:half], half) ^ row[half:]
    return int(_shifted(row, 1)[0])


def _shifted(words: np.ndarray, distance: int) -> np.ndarray:
    """Multiplies every word by x^(32 * distance)."""
    low, high = _shift_tables(distance)
    halves = np.ascontiguousarray(words).view("<u2").astype(np.intp)
    # "wrap" skips the bounds check: 16 bits cannot leave a table of 65,536.
    return low.take(halves[0::2], mode="wrap") ^ high.take(halves[1::2], mode="wrap")


@functools.cache
def _shift_tables(distance: int) -> tuple[np.ndarray, np.ndarray]:
    """x^(32 * distance) times every low and every high half of a word."""
    factor = _power(32 * distance)
    low = np.arange(1 << 16, dtype=np.uint32)
    return _product(factor, low), _product(factor, low << np.uint32(16))


@functools.cache
def _byte_table() -> list[int]:
    return _product(_power(8), np.arange(256, dtype=np.uint32)).tolist()


def _power(exponent: int) -> int:
    """Returns x^exponent modulo the polynomial."""
    power, square = 1 << 31, np.array([1 << 30], np.uint32)
    while exponent:
        if exponent & 1:
            power = int(_product(power, square)[0])
        square = _product(int(square[0]), square)
        exponent >>= 1
    return power


def _product(factor: int, values: np.ndarray) -> np.ndarray:
    """Returns the products of polynomials of 32 bits."""
    total = np.zeros_like(values)
    for bit in range(31, -1, -1):  # the coefficients of x^0, x^1, ...
        if factor >> bit & 1:
            total ^= values
        overflow = (values & np.uint32(1)) * np.uint32(_POLYNOMIAL)
        values = (values >> np.uint32(1)) ^ overflow
    return total
