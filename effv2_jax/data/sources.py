"""Where examples come from: random access to (encoded image or pixels, label, name).

`open_source(config.data, "train" | "eval")` opens what `data.source` names:

* `folder`: one sub-folder per class (sources_folder.py);
* `tfds`: a TensorFlow Datasets data set by name, read without TensorFlow (sources_tfds.py);
* `arrays`: idx files as Fashion-MNIST publishes them, or npz (sources_arrays.py);
* `digits`: scikit-learn's handwritten digits, embedded: no download (sources_arrays.py);
* `synthetic`: made-up pictures with labels that can be learnt (sources_arrays.py).

Sources are picklable: worker processes get a copy each.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from effv2_jax.errors import UserError

SOURCES = ("tfds", "folder", "arrays", "digits", "synthetic")
SPLITS = ("train", "eval")


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


def open_source(data_config: Any, split: str) -> Source:
    """Opens one split of the data set that a config describes.

    Args:
      data_config: the section `data` of a config (config_schema.py).
      split: "train" or "eval".

    Raises:
      UserError: the data set or the split does not exist, is empty or is inconsistent; the message
        says what was found and what to do.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    # Imported here: tensorflow_datasets alone takes a second that no other source should pay.
    match data_config.source:
        case "folder":
            from effv2_jax.data.sources_folder import open_folder

            source = open_folder(data_config, split)
        case "tfds":
            from effv2_jax.data.sources_tfds import open_tfds

            source = open_tfds(data_config, split)
        case "arrays":
            from effv2_jax.data.sources_arrays import open_arrays

            source = open_arrays(data_config, split)
        case "digits":
            from effv2_jax.data.sources_arrays import open_digits

            source = open_digits(split)
        case "synthetic":
            from effv2_jax.data.sources_arrays import open_synthetic

            source = open_synthetic(data_config, split)
        case other:
            raise UserError(f"data.source: found {other!r}, expected one of {', '.join(SOURCES)}")
    if data_config.cache == "decoded" and not source.in_memory:
        from effv2_jax.data.cache import DecodedCache

        source = DecodedCache(source, decoder=data_config.decoder)
    return source


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
