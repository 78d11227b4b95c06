"""The confusions of a classifier as a picture, from the eval.json of --mode eval.

    python -m effv2_jax.report.confusion WORKDIR/eval/eval.json [--out confusion.png]

Few classes: the matrix, a row per true class, with all counts. Many: where the mistakes lie, the
classes most often confused, and how the accuracies of the classes are spread.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from effv2_jax.atomic import replacing
from effv2_jax.command import Parser, exit_code
from effv2_jax.errors import UserError

_FEW = 40  # up to so many classes the whole matrix is legible
_PAIRS = 24  # confusions listed of many classes
_SYNSET = re.compile(r" \(n\d{8}\)$")  # behind a class of ImageNet
_INK, _FAINT, _GRID = "#2b2f36", "#6b7280", "#dfe4ea"
_RIGHT, _WRONG = "#0072B2", "#D55E00"  # Okabe and Ito's
_COLOURS = "Blues"


def draw_confusion(path: str | Path, *, out: str | Path | None = None) -> Path:
    """Draws the last result of an eval.json.

    Args:
        path: the eval.json.
        out: the picture; None: confusion.png beside it.

    Returns:
        The picture's path.

    Raises:
        UserError: it is no eval.json with one true class per example.
    """
    path = Path(path)
    report = _read(path)
    out = path.with_name("confusion.png") if out is None else Path(out)
    name, result = list(report["results"].items())[-1]
    present = [row["index"] for row in result["classes"] if row["examples"] or row["answered"]]
    few = len(present) <= _FEW
    figure = _draw_matrix(report, result, present) if few else _draw_overview(report, result)
    title = f"{report['model']}, {name}: {result['top1']:.2%} of {result['examples']:,} right"
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=12, fontweight="bold")
    with replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:] or "png", dpi=130)
    return out


def _read(path: Path) -> Mapping[str, Any]:
    try:
        report = json.loads(path.read_text())
        result = list(report["results"].values())[-1]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{path}: not the eval.json that --mode eval writes") from None
    if "confusions" not in result:
        raise UserError(f"{path}: has no confusions: its examples have several labels each")
    return report


def _draw_matrix(
    report: Mapping[str, Any], result: Mapping[str, Any], present: Sequence[int]
) -> Figure:
    """Rows: true classes; columns: answers; shaded by the share of the row, counts written in."""
    place = {index: at for at, index in enumerate(present)}
    counts = np.zeros((len(present), len(present)), int)
    for label, best, times in result["confusions"]:
        counts[place[label], place[best]] = times
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [_name(report, index) for index in present]

    side = max(4.5, 0.55 * len(present) + 1.5) if len(present) <= 14 else 0.34 * len(present) + 3
    figure = Figure(figsize=(side + 1.4, side + 0.9), layout="constrained", facecolor="white")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap=_COLOURS, vmin=0, vmax=1)
    size = 10 if len(present) <= 14 else max(5, 200 / len(present))
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = shares[row, column] > 0.55
        wrong = row != column and not dark
        axis.text(
            column,
            row,
            f"{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=size,
            color="white" if dark else _WRONG if wrong else _INK,
        )
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("answered", color=_INK)
    axis.set_ylabel("true class", color=_INK)
    _style(axis, size=max(6, min(9.5, 300 / len(present))))
    axis.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    bar.set_label("share of the true class", color=_INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_FAINT, labelsize=8)
    return figure


def _draw_overview(report: Mapping[str, Any], result: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(14, 8.6), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic(
        [["mistakes", "pairs"], ["mistakes", "spread"]],
        width_ratios=[1.15, 1],
        height_ratios=[2.3, 1],
    )
    wrong = [entry for entry in result["confusions"] if entry[0] != entry[1]]
    _draw_mistakes(axes["mistakes"], wrong, len(result["classes"]))
    _draw_pairs(axes["pairs"], report, result, wrong)
    _draw_spread(axes["spread"], result)
    return figure


def _draw_mistakes(axis: Axes, wrong: Sequence[Sequence[int]], num_classes: int) -> None:
    """A dot per pair of classes that were confused: at 1,000 classes a pixel would be lost."""
    axis.plot([0, num_classes], [0, num_classes], color=_GRID, linewidth=1, zorder=1)
    if wrong:
        labels, answers, times = np.asarray(sorted(wrong, key=lambda entry: entry[2])).T
        share = times / times.max()
        axis.scatter(
            answers, labels, s=2 + 60 * share, c=share, cmap="YlOrRd", vmin=-0.4, vmax=1,
            linewidths=0, zorder=2,
        )  # fmt: skip
    axis.set_xlim(-0.5, num_classes - 0.5)
    axis.set_ylim(num_classes - 0.5, -0.5)
    axis.set_aspect("equal")
    axis.set_xlabel("answered class", color=_INK)
    axis.set_ylabel("true class", color=_INK)
    axis.set_title("mistakes: larger and darker is more often", loc="left", color=_INK, fontsize=10)
    _style(axis)


def _draw_pairs(
    axis: Axes,
    report: Mapping[str, Any],
    result: Mapping[str, Any],
    wrong: Sequence[Sequence[int]],
) -> None:
    examples = {row["index"]: row["examples"] for row in result["classes"]}
    listed = sorted(wrong, key=lambda entry: (-entry[2], entry[0], entry[1]))[:_PAIRS]
    axis.set_title("most often confused", loc="left", color=_INK, fontsize=10)
    axis.axis("off")
    for row, (label, best, times) in enumerate(listed):
        height = 1 - (row + 0.7) / _PAIRS
        style = {"transform": axis.transAxes, "fontsize": 8.5, "va": "center", "clip_on": True}
        axis.text(0, height, _name(report, label, 26), color=_INK, **style)
        axis.text(0.41, height, f"taken for {_name(report, best, 26)}", color=_WRONG, **style)
        count = f"{times:,} of {examples[label]:,}"
        axis.text(1, height, count, color=_FAINT, ha="right", **style)


def _draw_spread(axis: Axes, result: Mapping[str, Any]) -> None:
    accuracies = [row["accuracy"] for row in result["classes"] if row["accuracy"] is not None]
    axis.hist(accuracies, bins=np.linspace(0, 1, 21), color=_RIGHT, rwidth=0.92)
    median = float(np.median(accuracies))
    axis.axvline(median, color=_WRONG, linewidth=1.2)
    title = f"accuracy of the {len(accuracies):,} classes, median {median:.1%}"
    axis.set_title(title, loc="left", color=_INK, fontsize=10)
    axis.set_ylabel("classes", color=_INK)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _style(axis)


def _name(report: Mapping[str, Any], index: int, width: int = 22) -> str:
    labels = report["labels"]
    name = str(index) if labels is None or index >= len(labels) else labels[index]
    if len(name) > width:
        name = _SYNSET.sub("", name)
    # matplotlib reads what stands between two dollars as a formula.
    name = name.replace("$", r"\$")
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _style(axis: Axes, *, size: float = 9) -> None:
    axis.tick_params(colors=_FAINT, labelsize=size, length=3)
    for side in axis.spines.values():
        side.set_color("#aab3bf")


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(
        "Draws the confusions of an evaluation.", prog="python -m effv2_jax.report.confusion"
    )
    parser.add_argument("file", help="the eval.json of an evaluation")
    parser.add_argument("--out", help="the picture; default: confusion.png beside the file")
    flags = parser.parse_args(arguments)
    print(draw_confusion(flags.file, out=flags.out))


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
