"""The deterministic batch of step n: shards, threads, worker processes, prefetch to the device.

The training stream is endless: position p shows example `order.example_indices(p)`, cropped with
random numbers made of (seed, p). A stage takes `batch_size` positions per step from its
`first_example` on; a host takes its slice of every batch. So the batch of step n is a function of
(seed, n, config): workers, threads, hosts and restarts do not change it, and any step is reached
at once.

Work is handed out in chunks of a batch, not in examples: a queue between processes is slow per
message, and a batch of 4,096 pictures is too much for one worker to make alone.
"""

import bisect
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from effv2_jax.data.decode import CorruptImageError, EncodedImage, as_rgb
from effv2_jax.data.device import to_device
from effv2_jax.data.order import example_indices, position_generator
from effv2_jax.data.preprocess import (
    CropSampling,
    evaluation_image,
    get_kind,
    training_image,
)
from effv2_jax.data.sources import Example, Source
from effv2_jax.errors import UserError

__all__ = ["Batches", "default_workers", "eval_batches", "to_device", "train_batches"]

Batch = dict[str, np.ndarray]

_CHUNK = 32  # examples a worker makes at a time
_SUBSTITUTES = 20  # broken pictures in a row before the data set is called broken
_EVAL_WORKERS_FROM = 20_000  # pictures; fewer are read before new processes have started


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the workers need to know of the section `data` of a config."""

    kind: str
    sampling: CropSampling | None
    decoder: str
    skip_corrupt: bool
    multilabel: bool

    @classmethod
    def from_config(cls, data_config: Any) -> "_Options":
        sampling = CropSampling(
            area=tuple(data_config.crop_area),
            aspect=tuple(data_config.crop_aspect),
            attempts=data_config.crop_attempts,
        )
        return cls(
            kind=get_kind(data_config.preprocessing).name,
            sampling=None if data_config.crop == "none" else sampling,
            decoder=data_config.decoder,
            skip_corrupt=data_config.on_corrupt == "skip",
            multilabel=bool(data_config.multilabel),
        )


def _open_image(example: Example, decoder: str) -> EncodedImage | np.ndarray:
    if isinstance(example.image, np.ndarray):
        return as_rgb(example.image, name=example.name)
    return EncodedImage(example.image, name=example.name, decoder=decoder)


def _empty_labels(count: int, source: Source, multilabel: bool) -> np.ndarray:
    if multilabel:
        return np.zeros((count, source.num_classes), np.float32)
    return np.zeros((count,), np.int32)


def _set_label(labels: np.ndarray, row: int, label: int | np.ndarray) -> None:
    if labels.ndim == 2 and np.ndim(label) == 0:
        labels[row, label] = 1
    else:
        labels[row] = label


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A piece of one host's part of a batch: `count` examples from stream position `first`."""

    first: int
    count: int
    image_size: int


class _TrainWork:
    """Makes the chunks of the training stream; picklable, runs in threads or processes."""

    def __init__(
        self,
        source: Source,
        stages: Sequence[Any],
        options: _Options,
        *,
        seed: int,
        start_step: int,
        stop_step: int,
        process_index: int,
        process_count: int,
    ) -> None:
        self._source, self._options, self._seed = source, options, seed
        self._stages = []  # (first step, first position, batch, local batch, size)
        self._first_chunks = []  # number of the first chunk of each stage
        self._host = process_index
        chunks = 0
        for stage in stages:
            begin, end = max(stage.start_step, start_step), min(stage.end_step, stop_step)
            if begin >= end:
                continue
            if stage.batch_size % process_count:
                raise UserError(
                    f"train.batch_size: found {stage.batch_size} in stage {stage.index}, expected "
                    f"a multiple of the {process_count} hosts"
                )
            first = stage.first_example + (begin - stage.start_step) * stage.batch_size
            local = stage.batch_size // process_count
            self._first_chunks.append(chunks)
            self._stages.append((begin, end, first, stage.batch_size, local, stage.image_size))
            chunks += (end - begin) * math.ceil(local / _CHUNK)
        self.num_chunks = chunks

    def steps(self) -> Iterator[tuple[int, int]]:
        """(local batch, image size) of every step in order."""
        for begin, end, _, _, local, size in self._stages:
            for _ in range(begin, end):
                yield local, size

    def _locate(self, number: int) -> _Chunk:
        stage = bisect.bisect_right(self._first_chunks, number) - 1
        _, _, first, batch, local, size = self._stages[stage]
        step, part = divmod(number - self._first_chunks[stage], math.ceil(local / _CHUNK))
        offset = part * _CHUNK
        position = first + step * batch + self._host * local + offset
        return _Chunk(position, min(_CHUNK, local - offset), size)

    def __call__(self, number: int) -> dict[str, Any]:
        try:
            return self._make(self._locate(int(number)))
        except UserError as error:
            # Sent as data: exceptions lose their type on the way through some queues.
            return {"error": str(error)}

    def _make(self, chunk: _Chunk) -> dict[str, Any]:
        positions = np.arange(chunk.first, chunk.first + chunk.count)
        indices = example_indices(positions, len(self._source), seed=self._seed)
        size = chunk.image_size
        images = np.empty((chunk.count, size, size, 3), np.uint8)
        labels = _empty_labels(chunk.count, self._source, self._options.multilabel)
        skipped: list[str] = []
        for row, (position, index) in enumerate(zip(positions, indices, strict=True)):
            rng = position_generator(int(position), seed=self._seed)
            example, images[row] = self._example(int(index), size, rng, skipped)
            _set_label(labels, row, example.label)
        return {"image": images, "label": labels, "skipped": skipped}

    def _example(
        self, index: int, size: int, rng: np.random.Generator, skipped: list[str]
    ) -> tuple[Example, np.ndarray]:
        kind = get_kind(self._options.kind)
        for _ in range(_SUBSTITUTES):
            try:
                example = self._source[index]
                image = training_image(
                    _open_image(example, self._options.decoder),
                    size=size,
                    rng=rng,
                    kind=kind,
                    sampling=self._options.sampling,
                )
                return example, image
            except CorruptImageError as error:
                if not self._options.skip_corrupt:
                    raise
                skipped.append(str(error))
                # The position's own random numbers choose the substitute: the same every time.
                index = int(rng.integers(len(self._source)))
        raise UserError(f"found {_SUBSTITUTES} broken pictures in a row, the last: {skipped[-1]}")


class _EvalWork:
    """Makes the chunks of an evaluation: every example once, in order, the rest masked."""

    def __init__(
        self,
        source: Source,
        options: _Options,
        *,
        image_size: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ) -> None:
        if batch_size % process_count:
            raise UserError(
                f"eval.batch_size: found {batch_size}, expected a multiple of the "
                f"{process_count} hosts"
            )
        self._source, self._options, self._size = source, options, image_size
        self._batch, self._local = batch_size, batch_size // process_count
        self._host = process_index
        self._per_batch = math.ceil(self._local / _CHUNK)
        # All hosts run the same number of batches, or the last all-reduce would wait for ever.
        self._batches = math.ceil(len(source) / batch_size)
        self.num_chunks = self._batches * self._per_batch

    def steps(self) -> Iterator[tuple[int, int]]:
        """(local batch, image size) of every batch in order."""
        for _ in range(self._batches):
            yield self._local, self._size

    def __call__(self, number: int) -> dict[str, Any]:
        batch, part = divmod(int(number), self._per_batch)
        offset = part * _CHUNK
        first = batch * self._batch + self._host * self._local + offset
        try:
            return self._make(first, min(_CHUNK, self._local - offset))
        except UserError as error:
            return {"error": str(error)}  # as in training

    def _make(self, first: int, count: int) -> dict[str, Any]:
        kind = get_kind(self._options.kind)
        images = np.zeros((count, self._size, self._size, 3), np.float32)
        labels = _empty_labels(count, self._source, self._options.multilabel)
        mask = np.zeros((count,), np.float32)
        skipped: list[str] = []
        for row in range(min(count, max(len(self._source) - first, 0))):
            try:
                example = self._source[first + row]
                image = _open_image(example, self._options.decoder)
                pixels = image if isinstance(image, np.ndarray) else image.pixels()
                images[row] = evaluation_image(pixels, size=self._size, kind=kind)
            except CorruptImageError as error:
                if not self._options.skip_corrupt:
                    raise
                skipped.append(str(error))
                continue
            _set_label(labels, row, example.label)
            mask[row] = 1
        return {"image": images, "label": labels, "mask": mask, "skipped": skipped}


class Batches(Iterator[Batch]):
    """Iterator over a host's batches. Close it, or use it as a context manager.

    Attributes:
      skipped: messages of the broken pictures met so far, each once, with data.on_corrupt='skip'.
      num_skipped: how often a broken picture was replaced or left out.
    """

    def __init__(self, work: _TrainWork | _EvalWork, *, workers: int, threads: int) -> None:
        """Starts nothing yet; the first `next` does.

        Args:
          work: makes chunks by number.
          workers: processes; 0: threads of this process.
          threads: per process; 0: everything happens in `next`.
        """
        self._work, self._workers, self._threads = work, workers, threads
        self._steps = work.steps()
        self._chunks: Iterator[dict[str, Any]] | None = None
        self.skipped: list[str] = []
        self.num_skipped = 0

    def __next__(self) -> Batch:
        local, _ = next(self._steps)
        if self._chunks is None:
            self._chunks = self._start()
        chunks = [self._chunk() for _ in range(math.ceil(local / _CHUNK))]
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
        chunk = next(self._chunks)
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
    work = _TrainWork(
        source,
        stages,
        _Options.from_config(data_config),
        seed=seed,
        start_step=start_step,
        stop_step=stop_step,
        process_index=process_index,
        process_count=process_count,
    )
    workers = data_config.workers
    if workers is None:
        workers = default_workers(source)
    return Batches(work, workers=workers, threads=data_config.threads)


def eval_batches(
    source: Source,
    data_config: Any,
    *,
    image_size: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The evaluation batches: every example of the split exactly once over all hosts.

    Args:
      source: the evaluation split.
      data_config: the section `data` of a config.
      image_size: pixels per side.
      batch_size: of all hosts together.
      process_index: this host.
      process_count: hosts; all run the same number of batches.

    Returns:
      Iterator of {"image": float32 [n, S, S, 3], pixels 0..255, unrounded, not normalised,
      "label": as in `train_batches`, "mask": float32 [n], 0 for padding and, with
      data.on_corrupt='skip', for broken pictures}; n = batch_size / process_count.

    Raises:
      UserError: as `train_batches`.
    """
    work = _EvalWork(
        source,
        _Options.from_config(data_config),
        image_size=image_size,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    workers = data_config.workers
    if workers is None:
        workers = default_workers(source) if len(source) >= _EVAL_WORKERS_FROM else 0
    return Batches(work, workers=workers, threads=data_config.threads)
