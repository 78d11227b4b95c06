"""What every source gives: examples, by random access; and how some are held out.

Sources are picklable: worker processes get a copy each.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Example(NamedTuple):
    """One labelled picture.

    Attributes:
      image: an encoded file (bytes), or uint8 [H, W], [H, W, 1] or [H, W, 3].
      label: class index, or multi-hot float32 [num_classes].
      name: what messages call it.
    """

    image: bytes | np.ndarray
    label: int | np.ndarray
    name: str


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split.

    Attributes:
      num_classes: labels are below it.
      label_names: the classes in order, or None.
      in_memory: the pictures are arrays in this process, so reading needs no other processes.
    """

    num_classes: int
    label_names: tuple[str, ...] | None
    in_memory: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def held_out(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Splits every class: which examples are held out for evaluation.

    The held-out examples are spread evenly over each class in the order of the examples, at least
    one of every class that has two. The same examples are held out every time, whatever the seed.

    Args:
      labels: integers [n].
      fraction: share held out, above 0 and below 1.

    Returns:
      bool [n], True where held out.
    """
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        if count > 0:
            chosen = (np.arange(count) + 0.5) * len(members) / count
            mask[members[chosen.astype(int)]] = True
    return mask
