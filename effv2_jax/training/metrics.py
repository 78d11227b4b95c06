"""What an evaluation says of a classifier: pure functions of one answer per example.

All counts are whole numbers that do not depend on the order or the grouping of the examples.
"""

import dataclasses
from typing import Any

import numpy as np

TOP_K = 5
CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True)
class Answers:
    """One entry per example, in any order.

    Attributes:
        label: int, the true class; -1 where examples have several.
        best: int, the class with the largest logit.
        rank: int, how many classes come before the first true one; `TOP_K` if that or more do.
        confidence: float, the probability of the best class.
        loss: float; 0 where `known` is False.
        known: bool, whether the network has the true class.
    """

    label: np.ndarray
    best: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclasses.dataclass(frozen=True)
class Bin:
    """The examples whose confidence is above `low` and at most `high`.

    Attributes:
        low: bound.
        high: bound.
        count: examples.
        accuracy: share of them that is right; 0 without examples.
        confidence: their mean confidence; 0 without examples.
    """

    low: float
    high: float
    count: int
    accuracy: float
    confidence: float


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """What happened to the examples of a class.

    Attributes:
        index: of the class.
        examples: that are of it.
        right: of these, taken for it.
        answered: examples of any class taken for it.
        mistaken_for: the class that its examples were most often wrongly taken for, or None.
        mistaken: how often.
    """

    index: int
    examples: int
    right: int
    answered: int
    mistaken_for: int | None
    mistaken: int

    @property
    def accuracy(self) -> float | None:
        """Share of its examples that are right (recall); None without examples."""
        return self.right / self.examples if self.examples else None

    @property
    def precision(self) -> float | None:
        """Share of the answers with this class that are right; None if it was never answered."""
        return self.right / self.answered if self.answered else None


def summary(answers: Answers) -> dict[str, Any]:
    """Returns examples, top1_right and top5_right as counts, and top1, top5, loss, ece.

    The loss is the mean over the examples whose class the network has.
    """
    count, known = len(answers), int(answers.known.sum())
    top1, top5 = int((answers.rank < 1).sum()), int((answers.rank < TOP_K).sum())
    return {
        "examples": count,
        "top1_right": top1,
        "top5_right": top5,
        "top1": top1 / count,
        "top5": top5 / count,
        "loss": float(answers.loss.sum(dtype=np.float64)) / known if known else None,
        "ece": expected_calibration_error(calibration(answers)),
    }


def calibration(answers: Answers, bins: int = CALIBRATION_BINS) -> list[Bin]:
    """Returns the examples by confidence, in bins of equal width (Guo et al. 2017, section 2).

    Bin m of M holds the confidences in ((m-1)/M, m/M].
    """
    confidence = answers.confidence.astype(np.float64)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    right = np.bincount(index[answers.rank < 1], minlength=bins)
    sums = np.bincount(index, weights=confidence, minlength=bins)
    divisor = np.maximum(counts, 1)
    return [
        Bin(m / bins, (m + 1) / bins, int(counts[m]), float(right[m] / divisor[m]),
            float(sums[m] / divisor[m]))
        for m in range(bins)
    ]  # fmt: skip


def expected_calibration_error(bins: list[Bin]) -> float:
    """Returns the mean over the examples of |accuracy - confidence| of their bin.

    Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks"
    (arXiv:1706.04599), equation 3.
    """
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / total


def confusions(answers: Answers) -> list[tuple[int, int, int]]:
    """Returns (true class, answered class, how often), only pairs that occur, sorted."""
    pairs = np.stack([answers.label, answers.best], 1).astype(np.int64)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    return [(int(a), int(b), int(n)) for (a, b), n in zip(found, counts, strict=True)]


def class_rows(pairs: list[tuple[int, int, int]], num_classes: int) -> list[ClassRow]:
    """Returns a row for every class, in their order.

    Args:
        pairs: from `confusions`.
        num_classes: all labels are below it.
    """
    examples, right, answered = (np.zeros(num_classes, np.int64) for _ in range(3))
    mistakes: dict[int, tuple[int, int]] = {}  # class -> (times, other class)
    for label, best, times in pairs:
        examples[label] += times
        answered[best] += times
        if label == best:
            right[label] = times
        elif times > mistakes.get(label, (0, -1))[0]:
            mistakes[label] = (times, best)
    rows = []
    for index in range(num_classes):
        times, other = mistakes.get(index, (0, None))
        counts = (int(a[index]) for a in (examples, right, answered))
        rows.append(ClassRow(index, *counts, other, times))
    return rows
