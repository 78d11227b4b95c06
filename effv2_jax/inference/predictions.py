"""Predictions as text: a table for people, JSON and CSV for programs."""

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effv2_jax.data.imagenet import readable

FORMATS = ("table", "json", "csv")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One class that was found.

    Attributes:
        index: of the class.
        label: its name.
        probability: its share, 0 to 1.
    """

    index: int
    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says of a picture.

    Attributes:
        path: of the picture.
        answers: the most probable classes, best first.
        truth: the class that the picture's folder is named for, or None.
        truth_index: its number, or None.
    """

    path: str
    answers: tuple[Answer, ...]
    truth: str | None = None
    truth_index: int | None = None

    @property
    def right(self) -> bool | None:
        """Whether the best class is the true one; None if that is not known."""
        return None if self.truth is None else self.answers[0].index == self.truth_index


def best_classes(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Returns the `count` most probable classes, best first, of equal ones the lowest: int [n, k].

    Args:
        probabilities: [n, classes].
        count: as many as there are if there are fewer.
    """
    return np.argsort(-probabilities, axis=-1, kind="stable")[:, :count]


def as_table(predictions: Sequence[Prediction], *, width: int | None = None) -> str:
    """Returns a line a picture if there is one answer each, else a line a picture and answer.

    Args:
        predictions: of all pictures.
        width: columns; None: those of the terminal.
    """
    width = width or shutil.get_terminal_size().columns
    if all(len(prediction.answers) == 1 for prediction in predictions):
        lines = _rows(predictions, width)
    else:
        lines = [line for prediction in predictions for line in _block(prediction, width)]
    return "".join(f"{line}\n" for line in lines)


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Returns a header and a line a picture and answer."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "rank", "class", "label", "probability", "truth"))
    for each in predictions:
        for rank, answer in enumerate(each.answers, 1):
            share = f"{answer.probability:.8g}"
            writer.writerow((each.path, rank, answer.index, answer.label, share, each.truth or ""))
    return text.getvalue()


def as_json(
    predictions: Sequence[Prediction],
    *,
    facts: Mapping[str, Any],
    skipped: Sequence[tuple[str, str]],
) -> str:
    """Returns one document.

    Args:
        predictions: of all pictures.
        facts: what stands beside them: weights, image size, ...
        skipped: (path, reason) of the files that were left out.
    """
    document = {
        **facts,
        "predictions": [
            {
                "file": each.path,
                "truth": each.truth,
                "top": [
                    {"class": a.index, "label": a.label, "probability": a.probability}
                    for a in each.answers
                ],
            }
            for each in predictions
        ],
        "skipped": [{"file": path, "reason": reason} for path, reason in skipped],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def shortened(text: str, width: int) -> str:
    """Returns the text, its middle left out if it is longer than `width`."""
    if len(text) <= width:
        return text
    tail = max(1, (width - 3) * 2 // 3)
    return f"{text[: max(0, width - 3 - tail)]}...{text[-tail:]}"


def _block(prediction: Prediction, width: int) -> list[str]:
    truth = readable(prediction.truth or "")
    verdict = {True: "  right", False: f"  wrong: {truth}", None: ""}[prediction.right]
    verdict = shortened(verdict, width // 2)
    lines = [shortened(prediction.path, width - len(verdict)) + verdict]
    for answer in prediction.answers:
        lines.append(
            f"  {answer.probability:8.2%}  {shortened(readable(answer.label), width - 12)}"
        )
    return lines


def _rows(predictions: Sequence[Prediction], width: int) -> list[str]:
    labels = [readable(each.answers[0].label) for each in predictions]
    label_width = min(max(map(len, labels), default=0), width // 3)
    lines = []
    for each, label in zip(predictions, labels, strict=True):
        mark = {True: "  right", False: "  wrong", None: ""}[each.right]
        label = shortened(label, label_width)
        name = shortened(each.path, width - label_width - 12 - len(mark))
        lines.append(f"{each.answers[0].probability:8.2%}  {label:{label_width}}  {name}{mark}")
    return lines
