"""Batches on the device before they are asked for."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np


class DevicePrefetch(Iterator[dict[str, Any]]):
    """Iterator over batches that a background thread puts on the device.

    Attributes:
      data_wait: seconds that `next` has waited since the counter was last set; the consumer may
        set it to 0. Large values mean that the host is too slow.
    """

    def __init__(
        self, batches: Iterator[dict[str, np.ndarray]], *, sharding: Any, depth: int
    ) -> None:
        """Starts the thread.

        Args:
          batches: of this host; closed with this iterator if it can be.
          sharding: of the first axis of every array, a `jax.sharding.Sharding`.
          depth: batches ready on the device; also the device memory that it costs.
        """
        self._batches, self._sharding = batches, sharding
        self._ready: queue.Queue[tuple[dict[str, Any] | None, BaseException | None]] = queue.Queue(
            max(depth, 1)
        )
        self._stop = threading.Event()
        self._ended = False
        self.data_wait = 0.0
        self._thread = threading.Thread(target=self._run, name="device-prefetch", daemon=True)
        self._thread.start()

    def _put(self, batch: dict[str, Any] | None, error: BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put((batch, error), timeout=0.5)
            except queue.Full:
                continue

    def _run(self) -> None:
        import jax

        try:
            for batch in self._batches:
                placed = {
                    key: jax.make_array_from_process_local_data(self._sharding, value)
                    for key, value in batch.items()
                }
                self._put(placed, None)
                if self._stop.is_set():
                    return
            self._put(None, None)
        except BaseException as error:  # raised again where the batch is asked for
            self._put(None, error)

    def __next__(self) -> dict[str, Any]:
        if self._ended:
            raise StopIteration
        start = time.perf_counter()
        batch, error = self._ready.get()
        self.data_wait += time.perf_counter() - start
        if batch is None:
            self._ended = True
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        return batch

    def close(self) -> None:
        """Ends the thread and closes the batches. Harmless when repeated."""
        self._ended = True
        self._stop.set()
        while True:  # a thread that waits for room sees the stop at once
            try:
                self._ready.get_nowait()
            except queue.Empty:
                break
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=30)
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> "DevicePrefetch":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def to_device(
    batches: Iterator[dict[str, np.ndarray]], sharding: Any, *, depth: int = 2
) -> DevicePrefetch:
    """Puts a host's batches on its devices ahead of time, from a background thread.

    Args:
      batches: dicts of arrays whose first axis is this host's part of the global batch.
      sharding: a `jax.sharding.Sharding`, or a `Mesh`: then the first axis is spread over the
        mesh's first axis.
      depth: batches ready on the device.

    Returns:
      Iterator of dicts of global `jax.Array`; errors of `batches` come out of its `next`.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    if isinstance(sharding, jax.sharding.Mesh):
        sharding = NamedSharding(sharding, PartitionSpec(sharding.axis_names[0]))
    return DevicePrefetch(batches, sharding=sharding, depth=depth)
