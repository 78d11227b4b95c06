import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effv2_jax.convert.crc32c import crc32c, masked


def bit_by_bit(data: bytes) -> int:
    """The definition."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "checksum"),
    [  # RFC 3720 appendix B.4, and the usual check value
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_published_values(data, checksum):
    assert crc32c(data) == checksum


def test_masked_is_leveldbs():
    assert masked(0) == 0xA282EAD8
    assert masked(0xE3069283) == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) % 2**32


# Around the places where the way of computing changes: 64 words, one row, several rows.
@pytest.mark.parametrize("size", [1, 3, 255, 256, 257, 259, 1000, 65_535, 131_073])
def test_every_way_of_computing_gives_the_definition(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == bit_by_bit(data)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_pieces_give_the_checksum_of_the_whole(data):
    size = data.draw(st.integers(0, 300_000))
    cut = data.draw(st.integers(0, size))
    content = np.random.default_rng(size).bytes(size)
    assert crc32c(content[cut:], crc32c(content[:cut])) == crc32c(content)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_changes_it(data):
    content = bytearray(np.random.default_rng(0).bytes(150_001))
    before = crc32c(content)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert crc32c(content) != before
