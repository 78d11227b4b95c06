"""Weights opened for use: the network, and all that turns a picture into names and shares."""

import collections
import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from effv2_jax.data import imagenet
from effv2_jax.data.kinds import Kind, get_kind, kind_of
from effv2_jax.errors import UserError
from effv2_jax.models.network import EfficientNet
from effv2_jax.models.variants import get_variant
from effv2_jax.pretrained import open_weights

SUBSETS = ("imagenet1k",)

_SIGMOID_LOSSES = ("sigmoid", "summed_sigmoid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A trained network and how it is meant to be used.

    Attributes:
        spec: as the user named it.
        model: the network, computing in float32.
        variables: {"params", "batch_stats"}.
        info: the header of the weights file.
        kind: of preprocessing.
        image_size: px.
        labels: names of the classes that are asked for, or None.
        subset: outputs that are asked for, int [classes], -1 for a class that the network does not
            know; None: all.
        sigmoid: whether each class was trained for itself: its share is sigmoid(logit), and the
            shares do not sum to 1.
    """

    spec: str
    model: EfficientNet
    variables: Mapping[str, Any]
    info: Mapping[str, Any]
    kind: Kind
    image_size: int
    labels: tuple[str, ...] | None
    subset: np.ndarray | None
    sigmoid: bool

    @property
    def num_classes(self) -> int:
        """Classes that are asked for."""
        return self.model.num_classes if self.subset is None else len(self.subset)

    def label(self, index: int) -> str:
        """Returns the name of a class, or its number where the weights know no names."""
        return str(index) if self.labels is None else self.labels[index]

    @functools.cached_property
    def folders(self) -> dict[str, int]:
        """Classes by the names that folders of their pictures have: their own, or synsets."""
        if self.labels is None:
            return {}
        names = list(zip(self.labels, range(self.num_classes), strict=True))
        if self.labels == imagenet.labels(self.num_classes):
            synsets = {imagenet.NUM_1K: imagenet.synsets_1k, imagenet.NUM_21K: imagenet.synsets_21k}
            names = list(zip(synsets[self.num_classes](), range(self.num_classes), strict=True))
        counts = collections.Counter(name for name, _ in names)
        return {name: index for name, index in names if counts[name] == 1}

    def output(self, index: int) -> int:
        """Returns which output of the network is the class."""
        return index if self.subset is None else int(self.subset[index])

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns the shares of the classes that are asked for, float64 [n, classes].

        Args:
            logits: float32 [n, outputs].
        """
        logits = logits.astype(np.float64)
        if self.subset is not None:
            logits = np.where(self.subset >= 0, logits[:, self.subset], -np.inf)
        if self.sigmoid:
            return 0.5 * (1 + np.tanh(logits / 2))  # sigmoid, without overflow
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True)


def open_for_use(spec: str, *, image_size: int | None = None, subset: str = "") -> Weights:
    """Opens weights for predictions; says on standard error what it has to assume.

    Args:
        spec: a weights file, or NAME:WEIGHTS (`effv2_jax.pretrained`).
        image_size: px; None: the size the weights are meant for.
        subset: "" or one of `SUBSETS`: only these classes of ImageNet21k weights count.

    Raises:
        UserError: the weights cannot be opened, or have no such subset.
    """
    model, variables, info = open_weights(spec)
    labels = info.get("labels")
    chosen = None
    if subset:
        chosen, labels = _subset(spec, model, subset)
    return Weights(
        spec=spec,
        model=model,
        variables=variables,
        info=info,
        kind=_kind(spec, info),
        image_size=image_size or info["image_size"],
        labels=None if labels is None else tuple(labels),
        subset=chosen,
        sigmoid=(info.get("source") or {}).get("loss") in _SIGMOID_LOSSES,
    )


def _kind(spec: str, info: Mapping[str, Any]) -> Kind:
    if info.get("preprocessing"):
        try:
            return kind_of(info["preprocessing"], image_size=info["image_size"])
        except UserError as error:
            raise UserError(f"{spec}: {error}") from None
    kind = get_kind(get_variant(info["model"]).preprocessing)
    print(
        f"{spec}: does not say how its images are made: {kind.name}, as {info['model']} was "
        "released with, is assumed",
        file=sys.stderr,
    )
    return kind


def _subset(spec: str, model: EfficientNet, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The outputs of a subset, and the names of its classes."""
    if name not in SUBSETS:
        raise UserError(f"subset of labels {name!r}: expected {' or '.join(SUBSETS)}")
    if model.num_classes != imagenet.NUM_21K:
        raise UserError(
            f"{spec}: has {model.num_classes:,} classes; the subset {name} is of the "
            f"{imagenet.NUM_21K:,} of ImageNet21k: leave it out"
        )
    return imagenet.subset_1k_of_21k(), imagenet.labels_1k()
