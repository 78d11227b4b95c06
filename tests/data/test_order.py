import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effv2_jax.data.order import example_indices, position_generator


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_every_epoch_shows_every_example_once(size, seed, epoch):
    positions = np.arange(size) + epoch * size
    indices = example_indices(positions, size, seed=seed)
    np.testing.assert_array_equal(np.sort(indices), np.arange(size))


def test_a_position_does_not_depend_on_what_is_asked_with_it():
    together = example_indices(np.arange(5000), 777, seed=4)
    for position in (0, 776, 777, 3333, 4999):
        assert example_indices(np.array([position]), 777, seed=4)[0] == together[position]


def test_epochs_and_seeds_have_their_own_order():
    size = 1000
    first, second = example_indices(np.arange(2 * size), size, seed=0).reshape(2, size)
    other = example_indices(np.arange(size), size, seed=1)
    # Two random permutations agree in one place on average.
    assert (first == second).sum() < 8
    assert (first == other).sum() < 8
    assert (first == np.arange(size)).sum() < 8


def test_the_order_is_uniform():
    # 3000 orders of 6 examples: each of the 36 (place, example) counts is 500 on average with a
    # deviation of 20.4; 5 of those are seen once in 50,000 such tests.
    size, trials = 6, 3000
    counts = np.zeros((size, size))
    orders = set()
    for seed in range(trials):
        indices = example_indices(np.arange(size), size, seed=seed)
        counts[np.arange(size), indices] += 1
        orders.add(tuple(indices))
    assert np.abs(counts - trials / size).max() < 5 * np.sqrt(trials / size * (1 - 1 / size))
    assert len(orders) > 690  # of 720; 709 are expected after 3000 draws


def test_neighbours_are_not_kept_together():
    indices = example_indices(np.arange(100_000), 100_000, seed=0)
    steps = np.abs(np.diff(indices))
    # The mean distance of two random numbers below n is n / 3.
    assert abs(steps.mean() / 100_000 - 1 / 3) < 0.005
    assert (steps == 1).sum() < 15


def test_the_order_of_a_seed_never_changes():
    # A resumed run must meet the same batches, also with a newer version of this package.
    assert example_indices(np.arange(8), 1_281_167, seed=0).tolist() == [
        189260,
        769753,
        1192166,
        336836,
        324991,
        694962,
        144514,
        292885,
    ]
    assert position_generator(12, seed=3).integers(1000, size=4).tolist() == [236, 790, 347, 981]


def test_large_data_sets_and_positions():
    positions = np.array([0, 10**12, 2**40])
    indices = example_indices(positions, 300_000_000, seed=9)
    assert ((indices >= 0) & (indices < 300_000_000)).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"position": 1}])
def test_random_numbers_depend_on_seed_and_position(change):
    def draw(position=0, seed=0):
        return position_generator(position, seed=seed).random(4).tolist()

    assert draw() == draw()
    assert draw() != draw(**change)
