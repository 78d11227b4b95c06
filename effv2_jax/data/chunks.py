"""What a worker of the loader makes: pieces of one host's part of a batch.

A piece (chunk) is asked for by its number and is a function of that number, the seed and the
config; who makes it, a thread or another process, and in which order, changes nothing. Work is
handed out in chunks, not in examples: a queue between processes is slow per message, and a batch
of 4,096 pictures is too much for one worker to make alone.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from effv2_jax.data import decode_fast
from effv2_jax.data.decode import CorruptImageError, EncodedImage, as_rgb
from effv2_jax.data.examples import Example, Source
from effv2_jax.data.kinds import Kind, get_kind
from effv2_jax.data.order import example_indices, position_generator
from effv2_jax.data.preprocess import CropSampling, evaluation_image, training_image
from effv2_jax.errors import UserError

CHUNK = 32  # examples made at a time
_SUBSTITUTES = 20  # broken pictures in a row before the data set is called broken


@dataclasses.dataclass(frozen=True)
class Options:
    """What the workers need to know of the section `data` of a config.

    Attributes:
      kind: of preprocessing.
      sampling: of training crops; None: no crop.
      decoder: one of `decode.DECODERS`.
      skip_corrupt: broken pictures are replaced (training) or left out (evaluation).
      multilabel: labels are multi-hot vectors.
    """

    kind: Kind
    sampling: CropSampling | None
    decoder: str
    skip_corrupt: bool
    multilabel: bool

    @classmethod
    def from_config(cls, data_config: Any, *, kind: Kind | None = None) -> "Options":
        """Reads them from the section `data` of a config.

        Args:
          data_config: the section.
          kind: of preprocessing; None: the config's.

        Raises:
          UserError: the decoder's packages are not installed.
        """
        if data_config.decoder == "simplejpeg":
            decode_fast.require()
        sampling = CropSampling(
            area=tuple(data_config.crop_area),
            aspect=tuple(data_config.crop_aspect),
            attempts=data_config.crop_attempts,
        )
        return cls(
            kind=kind or get_kind(data_config.preprocessing),
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
class _Span:
    """The steps of one stage that are asked for.

    Attributes:
      first_chunk: number of its first chunk.
      steps: how many.
      first_position: position in the stream of its first example (of all hosts).
      batch_size: of all hosts.
      local: examples per step of this host.
      image_size: pixels per side.
    """

    first_chunk: int
    steps: int
    first_position: int
    batch_size: int
    local: int
    image_size: int


class TrainChunks:
    """The chunks of the training stream; picklable.

    Attributes:
      num_chunks: numbers are below it.
      chunk_bytes: the largest chunk's size in memory.
    """

    def __init__(
        self,
        source: Source,
        stages: Sequence[Any],
        options: Options,
        *,
        seed: int,
        start_step: int,
        stop_step: int,
        process_index: int,
        process_count: int,
    ) -> None:
        """Plans the chunks; arguments as `loader.train_batches`."""
        self._source, self._options, self._seed = source, options, seed
        self._host = process_index
        self._spans: list[_Span] = []
        self.num_chunks = 0
        for stage in stages:
            begin, end = max(stage.start_step, start_step), min(stage.end_step, stop_step)
            if begin >= end:
                continue
            if stage.batch_size % process_count:
                raise UserError(
                    f"train.batch_size: found {stage.batch_size} in stage {stage.index}, expected "
                    f"a multiple of the {process_count} hosts"
                )
            span = _Span(
                first_chunk=self.num_chunks,
                steps=end - begin,
                first_position=stage.first_example + (begin - stage.start_step) * stage.batch_size,
                batch_size=stage.batch_size,
                local=stage.batch_size // process_count,
                image_size=stage.image_size,
            )
            self._spans.append(span)
            self.num_chunks += span.steps * math.ceil(span.local / CHUNK)
        self._starts = [span.first_chunk for span in self._spans]
        self.chunk_bytes = max(
            (min(span.local, CHUNK) * span.image_size**2 * 3 for span in self._spans), default=0
        )

    def local_batches(self) -> Iterator[int]:
        """This host's batch size of every step in order."""
        for span in self._spans:
            for _ in range(span.steps):
                yield span.local

    def __call__(self, number: int) -> dict[str, Any]:
        """Makes a chunk.

        Args:
          number: of the chunk.

        Returns:
          {"image": uint8 [n, S, S, 3], "label": [n] or [n, classes], "skipped": [message, ...]},
          or {"error": message}: exceptions lose their type on the way through some queues.
        """
        span = self._spans[bisect.bisect_right(self._starts, int(number)) - 1]
        step, part = divmod(int(number) - span.first_chunk, math.ceil(span.local / CHUNK))
        offset = part * CHUNK
        first = span.first_position + step * span.batch_size + self._host * span.local + offset
        try:
            return self._make(first, min(CHUNK, span.local - offset), span.image_size)
        except UserError as error:
            return {"error": str(error)}

    def _make(self, first: int, count: int, size: int) -> dict[str, Any]:
        positions = np.arange(first, first + count)
        indices = example_indices(positions, len(self._source), seed=self._seed)
        images = np.empty((count, size, size, 3), np.uint8)
        labels = _empty_labels(count, self._source, self._options.multilabel)
        skipped: list[str] = []
        for row in range(count):
            rng = position_generator(first + row, seed=self._seed)
            images[row], label = self._example(int(indices[row]), size, rng, skipped)
            _set_label(labels, row, label)
        return {"image": images, "label": labels, "skipped": skipped}

    def _example(
        self, index: int, size: int, rng: np.random.Generator, skipped: list[str]
    ) -> tuple[np.ndarray, int | np.ndarray]:
        options = self._options
        for _ in range(_SUBSTITUTES):
            try:
                example = self._source[index]
                image = training_image(
                    _open_image(example, options.decoder),
                    size=size,
                    rng=rng,
                    kind=options.kind,
                    sampling=options.sampling,
                    fast_resize=options.decoder == "simplejpeg",
                )
                return image, example.label
            except CorruptImageError as error:
                if not options.skip_corrupt:
                    raise
                skipped.append(str(error))
                # The position's own random numbers choose the substitute: the same every time.
                index = int(rng.integers(len(self._source)))
        raise UserError(f"found {_SUBSTITUTES} broken pictures in a row, the last: {skipped[-1]}")


class EvalChunks:
    """The chunks of an evaluation: every example once, in order, the rest masked. Picklable.

    Attributes:
      num_chunks: numbers are below it.
      chunk_bytes: the largest chunk's size in memory.
    """

    def __init__(
        self,
        source: Source,
        options: Options,
        *,
        image_size: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ) -> None:
        """Plans the chunks; arguments as `loader.eval_batches`."""
        if batch_size % process_count:
            raise UserError(
                f"eval.batch_size: found {batch_size}, expected a multiple of the "
                f"{process_count} hosts"
            )
        self._source, self._options, self._size = source, options, image_size
        self._batch, self._local = batch_size, batch_size // process_count
        self._host = process_index
        self._per_batch = math.ceil(self._local / CHUNK)
        # All hosts run the same number of batches, or the last all-reduce would wait for ever.
        self._batches = math.ceil(len(source) / batch_size)
        self.num_chunks = self._batches * self._per_batch
        self.chunk_bytes = min(self._local, CHUNK) * image_size**2 * 3 * 4

    def local_batches(self) -> Iterator[int]:
        """This host's batch size of every batch in order."""
        for _ in range(self._batches):
            yield self._local

    def __call__(self, number: int) -> dict[str, Any]:
        """Makes a chunk: as in training, with float32 images and a "mask" float32 [n]."""
        batch, part = divmod(int(number), self._per_batch)
        offset = part * CHUNK
        first = batch * self._batch + self._host * self._local + offset
        try:
            return self._make(first, min(CHUNK, self._local - offset))
        except UserError as error:
            return {"error": str(error)}

    def _make(self, first: int, count: int) -> dict[str, Any]:
        images = np.zeros((count, self._size, self._size, 3), np.float32)
        labels = _empty_labels(count, self._source, self._options.multilabel)
        mask = np.zeros((count,), np.float32)
        skipped: list[str] = []
        for row in range(min(count, max(len(self._source) - first, 0))):
            try:
                example = self._source[first + row]
                image = _open_image(example, self._options.decoder)
                pixels = image if isinstance(image, np.ndarray) else image.pixels()
                images[row] = evaluation_image(pixels, size=self._size, kind=self._options.kind)
            except CorruptImageError as error:
                if not self._options.skip_corrupt:
                    raise
                skipped.append(str(error))
                continue
            _set_label(labels, row, example.label)
            mask[row] = 1
        return {"image": images, "label": labels, "mask": mask, "skipped": skipped}
