"""Decoded pictures kept in host memory (data.cache='decoded')."""

import logging
import os
from typing import Any

import numpy as np

from effv2_jax.data.decode import decode
from effv2_jax.data.examples import Example, Source

_MEMORY_SHARE = 0.6  # of the machine's memory that the cache may fill


class DecodedCache:
    """A source whose pictures are decoded once and then kept. See `Source`.

    Pays where decoding is the bottleneck and the decoded pictures fit into memory. When the share
    of memory is used up the remaining pictures are decoded every time, and a warning says so once.
    """

    in_memory = True  # crops come from arrays: threads of this process, no other processes

    def __init__(self, source: Source, *, decoder: str, limit_bytes: int | None = None) -> None:
        """Wraps a source.

        Args:
          source: of encoded pictures.
          decoder: one of `decode.DECODERS`.
          limit_bytes: most that is kept; None: a share of the machine's memory.
        """
        if limit_bytes is None:
            limit_bytes = int(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _MEMORY_SHARE
            )
        self._source, self._decoder, self._limit = source, decoder, limit_bytes
        self._kept: dict[int, Example] = {}
        self._bytes = 0
        self._full = False
        self.num_classes, self.label_names = source.num_classes, source.label_names

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_bytes": 0, "_full": False}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        example = self._source[index]
        if not isinstance(example.image, np.ndarray):
            pixels = decode(example.image, name=example.name, decoder=self._decoder)
            example = example._replace(image=pixels)
        # Two threads may decode the same picture at once: both results are equal.
        if self._bytes + example.image.nbytes <= self._limit:
            if self._kept.setdefault(index, example) is example:
                self._bytes += example.image.nbytes
        elif not self._full:
            self._full = True
            logging.getLogger(__name__).warning(
                "data.cache='decoded': %.1f GB hold %d of %d pictures; the others are decoded "
                "every time",
                self._bytes / 1e9,
                len(self._kept),
                len(self),
            )
        return example
