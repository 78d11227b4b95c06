"""The classes of ImageNet: names and WordNet synsets of the 1,000 and of the 21,843.

The 21,843 are the fall 2011 release in the order of its synset numbers, with two synsets that have
no pictures (n03931044 and n09859684): the order of Google's models. TensorFlow Hub's page of
EfficientNetV2-S on ImageNet-21k says that its outputs are those of imagenet21k_wordnet_lemmas.txt
of google-research/big_transfer, and timm has the same list (imagenet21k_goog_synsets.txt). The
label file of the official code (efficientnetv2/g3doc/imagenet21k_labels.txt) has 21,842 lines for
21,843 outputs: it lacks the two and has one that is none of them, so that 8,754 of its lines stand
beside their output.

Names and the order of the 1,000 are those of g3doc/imagenet1k_labels.txt; they equal timm's
imagenet_synset_to_lemma.txt and the synsets of tensorflow_datasets.

`data/imagenet.npz` holds the tables. Imports no JAX.
"""

import functools
import re
from pathlib import Path

import numpy as np

NUM_1K = 1000
NUM_21K = 21843

_SYNSET = re.compile(r"n\d{8}")
_TABLES = Path(__file__).with_name("imagenet.npz")


def labels_1k() -> tuple[str, ...]:
    """Names of the 1,000 classes, "tench, Tinca tinca" first; two are called "crane"."""
    names, absent = _names(), iter(_names()[NUM_21K:])
    return tuple(names[i] if i >= 0 else next(absent) for i in subset_1k_of_21k())


def labels_21k() -> tuple[str, ...]:
    """Names of the 21,843 classes in the order of the outputs; some names occur twice."""
    return _names()[:NUM_21K]


def synsets_1k() -> tuple[str, ...]:
    """WordNet synsets of the 1,000 classes, "n01440764" first: the folders of the data set."""
    synsets, absent = synsets_21k(), iter(_load()["absent"])
    return tuple(synsets[i] if i >= 0 else _synset(next(absent)) for i in subset_1k_of_21k())


def synsets_21k() -> tuple[str, ...]:
    """WordNet synsets of the 21,843 classes in the order of the outputs, sorted."""
    return tuple(_synset(number) for number in np.cumsum(_load()["synset_steps"]))


def subset_1k_of_21k() -> np.ndarray:
    """Index among the 21,843 of each of the 1,000 classes, int32 [1000].

    -1 where there is none: n04399382, "teddy", was added to the 1,000 only. An index of -1 would
    silently take the last class; `logits_1k` does it right.
    """
    return _load()["subset"].astype(np.int32)


def logits_1k(logits: np.ndarray) -> np.ndarray:
    """Returns logits [..., 1000] from logits [..., 21843]; the class that is absent gets -inf."""
    subset = subset_1k_of_21k()
    return np.where(subset >= 0, np.asarray(logits)[..., subset], -np.inf).astype(np.float32)


def labels(num_classes: int) -> tuple[str, ...] | None:
    """Names for outputs of ImageNet by their number; None if it is neither 1,000 nor 21,843."""
    known = {NUM_1K: labels_1k, NUM_21K: labels_21k}
    return known[num_classes]() if num_classes in known else None


def readable(label: str) -> str:
    """Returns a synset behind the first of its names, "tench (n01440764)"; other labels as is."""
    if not _SYNSET.fullmatch(label):
        return label
    name = _names_of_synsets().get(label)
    return label if name is None else f"{name.split(',')[0]} ({label})"


def without_synset(label: str) -> str:
    """Returns a label without the synset that `readable` put behind its name."""
    name, _, synset = label.rpartition(" (")
    return name if _SYNSET.fullmatch(synset.removesuffix(")")) and name else label


def _synset(number: int) -> str:
    return f"n{number:08d}"


@functools.cache
def _load() -> dict[str, np.ndarray]:
    with np.load(_TABLES) as tables:
        return dict(tables)


@functools.cache
def _names() -> tuple[str, ...]:
    """Names of the 21,843, then those of the 1,000 that are not among them."""
    return tuple(_load()["names"].tobytes().decode().split("\n"))


@functools.cache
def _names_of_synsets() -> dict[str, str]:
    # Where both have a synset, the names of the 1,000 are the better known.
    return {
        **dict(zip(synsets_21k(), labels_21k(), strict=True)),
        **dict(zip(synsets_1k(), labels_1k(), strict=True)),
    }
