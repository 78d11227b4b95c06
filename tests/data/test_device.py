import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effv2_jax.data.loader import to_device
from effv2_jax.errors import UserError


@pytest.fixture
def mesh():
    return jax.make_mesh((len(jax.devices()),), ("data",))


def _batch(number, rows=8):
    return {
        "image": np.full((rows, 2, 2, 3), number, np.uint8),
        "label": np.arange(rows, dtype=np.int32),
    }


class Closing:
    """An iterator that remembers being closed."""

    def __init__(self, batches):
        self._batches, self.closed = iter(batches), False

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._batches)

    def close(self):
        self.closed = True


def test_batches_arrive_in_order_spread_over_the_mesh(mesh):
    source = Closing(_batch(i) for i in range(5))
    numbers = []
    for batch in to_device(source, mesh, depth=2):
        assert batch["image"].sharding == NamedSharding(mesh, PartitionSpec("data"))
        assert len(batch["label"].addressable_shards) == len(jax.devices())
        np.testing.assert_array_equal(batch["label"], np.arange(8))
        numbers.append(int(np.asarray(batch["image"])[0, 0, 0, 0]))
    assert numbers == list(range(5))
    assert source.closed


def test_no_more_than_depth_batches_are_made_ahead(mesh):
    made = []
    batches = to_device((made.append(i) or _batch(i) for i in range(100)), mesh, depth=2)
    next(batches)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    # One taken, two ready, one in the thread's hand.
    assert len(made) == 4
    batches.close()


def test_an_error_reaches_the_consumer_after_the_good_batches(mesh):
    def broken():
        yield _batch(0)
        raise UserError("x.jpg: cannot decode")

    batches = to_device(broken(), mesh)
    next(batches)
    with pytest.raises(UserError, match=r"x.jpg"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_waiting_is_measured(mesh):
    def slow():
        for i in range(3):
            time.sleep(0.1)
            yield _batch(i)

    batches = to_device(slow(), mesh, depth=1)
    list(batches)
    assert 0.2 < batches.data_wait < 2
    fast = to_device(iter([_batch(0)] * 3), mesh, depth=3)
    time.sleep(0.3)
    next(fast)
    assert fast.data_wait < 0.1
    fast.close()


def test_closing_in_the_middle_ends_the_thread_and_the_source(mesh):
    before = set(threading.enumerate())
    source = Closing(_batch(i) for i in range(1000))
    with to_device(source, mesh, depth=2) as batches:
        next(batches)
    assert source.closed
    assert not {thread for thread in threading.enumerate() if thread not in before}
    with pytest.raises(StopIteration):
        next(batches)


def test_a_batch_that_the_mesh_cannot_divide_is_an_error(mesh):
    if len(jax.devices()) == 1:
        pytest.skip("one device divides everything")
    with pytest.raises(ValueError, match=r"divide"):
        next(to_device(iter([_batch(0, rows=5)]), mesh))
