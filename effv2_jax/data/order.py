"""Which example stands where: the order of an epoch and the random numbers of a position.

Both are computed from (seed, position), nothing is stored: any step can be reached at once, and
the order is the same whoever asks, in whichever process, before or after a restart.
"""

import numpy as np

_ROUNDS = 8  # of the Feistel network; 4 suffice in theory, the others cost nanoseconds
_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a good hash of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, *, key: np.ndarray) -> np.ndarray:
    """Element `index` of a pseudo-random permutation of 0..size-1, without making the others.

    A Feistel network over the smallest even number of bits that holds `size`, walked until the
    value is below `size` (Black and Rogaway 2002, "cycle walking"): always a bijection.

    Args:
      index: uint64 [n], each below `size`.
      size: of the permutation, at least 1.
      key: uint64 [n]; equal keys mean the same permutation.

    Returns:
      uint64 [n].
    """
    half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = np.array(index, np.uint64)
    key = np.broadcast_to(np.asarray(key, np.uint64), result.shape)
    walking = np.ones(result.shape, bool)
    while walking.any():
        left, right = result[walking] >> half, result[walking] & mask
        keys = key[walking]
        for i in range(_ROUNDS):
            word = _mix(right ^ (_mix(keys + np.uint64(i + 1)) & _MASK))
            left, right = right, left ^ (word & mask)
        result[walking] = (left << half) | right
        walking &= result >= np.uint64(size)
    return result


def example_indices(positions: np.ndarray, num_examples: int, *, seed: int) -> np.ndarray:
    """The examples at these positions of the endless training stream.

    Position p belongs to epoch p // num_examples; every epoch has its own order and shows every
    example once.

    Args:
      positions: integers [n], from 0 on.
      num_examples: of the data set.
      seed: of the run.

    Returns:
      int64 [n], below `num_examples`.
    """
    positions = np.asarray(positions, np.uint64)
    size = np.uint64(num_examples)
    epoch, within = positions // size, positions % size
    with np.errstate(over="ignore"):  # the hash wraps on purpose
        key = _mix(epoch + _mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
        return permute(within, num_examples, key=key).astype(np.int64)


def position_generator(position: int, *, seed: int) -> np.random.Generator:
    """The random numbers of one position of the training stream (Philox, keyed, no state)."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))
