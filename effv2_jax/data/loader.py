"""The deterministic batch of step n: shards, threads, worker processes, prefetch to the device.

The training stream is endless: position p shows example `order.example_indices(p)`, cropped with
random numbers made of (seed, p). A stage takes `batch_size` positions per step from its
`first_example` on; a host takes its slice of every batch. So the batch of step n is a function of
(seed, n, config): workers, threads, hosts and restarts do not change it, and any step is reached
at once.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from effv2_jax.data.chunks import CHUNK, EvalChunks, Options, TrainChunks
from effv2_jax.data.device import to_device
from effv2_jax.data.examples import Source
from effv2_jax.data.kinds import Kind
from effv2_jax.errors import UserError

__all__ = ["Batches", "default_workers", "eval_batches", "to_device", "train_batches"]

Batch = dict[str, np.ndarray]

_CHUNKS_IN_FLIGHT = 5  # per worker: in its queue, being made, being read
_EVAL_WORKERS_FROM = 20_000  # pictures; fewer are read before new processes have started


class Batches(Iterator[Batch]):
    """Iterator over a host's batches. Close it, or use it as a context manager.

    Attributes:
      skipped: messages of the broken pictures met so far, each once, with data.on_corrupt='skip'.
      num_skipped: how often a broken picture was replaced or left out.
    """

    def __init__(self, work: TrainChunks | EvalChunks, *, workers: int, threads: int) -> None:
        """Starts nothing yet; the first `next` does.

        Args:
          work: makes chunks by number.
          workers: processes; 0: threads of this process.
          threads: per process; 0: everything happens in `next`.
        """
        if workers:
            workers = _fitting_workers(workers, chunk_bytes=work.chunk_bytes)
        self._work, self._workers, self._threads = work, workers, threads
        self._steps = work.local_batches()
        self._chunks: Iterator[dict[str, Any]] | None = None
        self.skipped: list[str] = []
        self.num_skipped = 0

    def __next__(self) -> Batch:
        local = next(self._steps)
        if self._chunks is None:
            self._chunks = self._start()
        chunks = [self._chunk() for _ in range(math.ceil(local / CHUNK))]
        keys = [key for key in chunks[0] if key != "skipped"]
        # Always copied: what comes from a worker lies in its shared memory.
        return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in keys}

    def _start(self) -> Iterator[dict[str, Any]]:
        if self._workers == 0 and self._threads == 0:
            return map(self._work, range(self._work.num_chunks))
        import grain  # imports JAX, which worker processes and readers of this module do not need

        threads = max(self._threads, 1)
        dataset = grain.MapDataset.range(self._work.num_chunks).map(self._work)
        dataset = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
        if self._workers:
            from absl import flags

            from effv2_jax.data.worker import start_worker

            # Grain reads its own absl flags, which fails in programs that do not use absl.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2),
                worker_init_fn=start_worker,
            )
        return iter(dataset)

    def _chunk(self) -> dict[str, Any]:
        try:
            chunk = next(self._chunks)
        except RuntimeError as error:
            self.close()
            raise RuntimeError(
                f"a loader process ended unexpectedly ({error}); if the system killed it for its "
                f"memory, use fewer data.workers"
            ) from error
        if "error" in chunk:
            self.close()
            raise UserError(chunk["error"])
        for message in chunk["skipped"]:
            self.num_skipped += 1
            if message not in self.skipped:
                self.skipped.append(message)
                logging.getLogger(__name__).warning("skipped: %s", message)
        return chunk

    def close(self) -> None:
        """Ends threads and processes. Harmless when repeated."""
        self._steps = iter(())
        chunks, self._chunks = self._chunks, None
        if hasattr(chunks, "close"):
            chunks.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def default_workers(source: Source, *, cores: int | None = None) -> int:
    """Worker processes when the config does not say.

    None for pictures in memory and on small machines (decoding frees the interpreter lock, so
    threads do); otherwise all cores but two, at most 16.
    """
    cores = _cores() if cores is None else cores
    return 0 if source.in_memory or cores <= 4 else min(cores - 2, 16)


def _workers(data_config: Any, *, default: int) -> int:
    """The worker processes of `data.workers`, or the default.

    Raises:
      UserError: processes and a cache, which would be kept once in each process.
    """
    if data_config.workers is None:
        return default
    if data_config.workers and data_config.cache == "decoded":
        raise UserError(
            f"data.workers: found {data_config.workers} with data.cache='decoded', expected 0: "
            f"every process would keep its own copy of the pictures"
        )
    return data_config.workers


def _fitting_workers(workers: int, *, chunk_bytes: int, free_bytes: int | None = None) -> int:
    """So many of the wanted workers as shared memory can carry.

    Chunks travel through /dev/shm, which has 64 MB in a container by default; a worker that finds
    it full dies of a bus error.

    Args:
      workers: wanted.
      chunk_bytes: size of the largest chunk.
      free_bytes: of shared memory; None: asked of the system.
    """
    if free_bytes is None:
        if not os.path.isdir("/dev/shm"):
            return workers
        stat = os.statvfs("/dev/shm")
        free_bytes = stat.f_bavail * stat.f_frsize
    fitting = free_bytes // (_CHUNKS_IN_FLIGHT * max(chunk_bytes, 1))
    if fitting >= workers:
        return workers
    logging.getLogger(__name__).warning(
        "/dev/shm has %d MB free: %d loader processes instead of %d; give the container more "
        "(docker run --shm-size=8g)",
        free_bytes // 2**20,
        fitting,
        workers,
    )
    return fitting


def train_batches(
    source: Source,
    stages: Sequence[Any],
    data_config: Any,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The training batches of steps `start_step` to `stop_step` (exclusive), one after another.

    Args:
      source: the training split.
      stages: `training.progressive.Stage`; a batch has the size of the stage of its step.
      data_config: the section `data` of a config.
      seed: of the run: decides order and crops.
      start_step: first step.
      stop_step: end, exclusive.
      process_index: this host.
      process_count: hosts; each gets a contiguous part of every batch.

    Returns:
      Iterator of {"image": uint8 [local batch, S, S, 3], "label": int32 [local batch] or, with
      data.multilabel, float32 [local batch, classes]}.

    Raises:
      UserError: the batch does not divide by the hosts; while iterating: a picture is broken
        (data.on_corrupt='error').
    """
    work = TrainChunks(
        source,
        stages,
        Options.from_config(data_config),
        seed=seed,
        start_step=start_step,
        stop_step=stop_step,
        process_index=process_index,
        process_count=process_count,
    )
    workers = _workers(data_config, default=default_workers(source))
    return Batches(work, workers=workers, threads=data_config.threads)


def eval_batches(
    source: Source,
    data_config: Any,
    *,
    image_size: int,
    batch_size: int,
    kind: Kind | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The evaluation batches: every example of the split exactly once over all hosts.

    Args:
      source: the evaluation split.
      data_config: the section `data` of a config.
      image_size: pixels per side.
      batch_size: of all hosts together.
      kind: of preprocessing; None: the config's.
      process_index: this host.
      process_count: hosts; all run the same number of batches.

    Returns:
      Iterator of {"image": float32 [n, S, S, 3], pixels 0..255, unrounded, not normalised,
      "label": as in `train_batches`, "mask": float32 [n], 0 for padding and, with
      data.on_corrupt='skip', for broken pictures}; n = batch_size / process_count.

    Raises:
      UserError: as `train_batches`.
    """
    work = EvalChunks(
        source,
        Options.from_config(data_config, kind=kind),
        image_size=image_size,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    default = default_workers(source) if len(source) >= _EVAL_WORKERS_FROM else 0
    workers = _workers(data_config, default=default)
    return Batches(work, workers=workers, threads=data_config.threads)
