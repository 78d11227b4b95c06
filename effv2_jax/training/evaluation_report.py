"""What --mode eval found, as one document, as text, and as files."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effv2_jax.atomic import replacing, write_json
from effv2_jax.data.imagenet import readable, without_synset
from effv2_jax.errors import UserError
from effv2_jax.training.metrics import (
    CALIBRATION_BINS,
    Answers,
    calibration,
    class_rows,
    confusions,
    summary,
)

_FEW = 20  # up to so many classes all are printed, of more the worst and the best
_SHOWN = 5  # of each
_NAME = 26  # columns of a class name

Report = dict[str, Any]


def make_report(
    answers: Mapping[str, Answers],
    *,
    labels: Sequence[str] | None,
    num_classes: int,
    facts: Mapping[str, Any],
) -> Report:
    """Returns the document.

    Args:
        answers: name of the weights -> their answer to each example.
        labels: names of the classes, or None; synsets get a name before them.
        num_classes: all labels and answers are below it.
        facts: what stands beside the metrics.
    """
    results = {}
    for name, each in answers.items():
        result: Report = summary(each)
        result["calibration"] = [dataclasses.asdict(b) for b in calibration(each)]
        if (each.label >= 0).all():  # with several labels an example has no one true class
            pairs = confusions(each)
            result["unknown"] = int((~each.known).sum())
            result["classes"] = [
                {**dataclasses.asdict(row), "accuracy": row.accuracy, "precision": row.precision}
                for row in class_rows(pairs, num_classes)
            ]
            result["confusions"] = pairs
        results[name] = result
    labels = None if labels is None else [readable(label) for label in labels]
    return {**facts, "num_classes": num_classes, "labels": labels, "results": results}


def chosen_result(report: Report) -> Report:
    """Returns the result of the weights that a run saves: the moving average, if there is one."""
    return list(report["results"].values())[-1]


def as_text(report: Report) -> str:
    """Returns what is printed: metrics side by side, then the classes."""
    results = report["results"]
    result = chosen_result(report)
    lines = [
        f"{report['weights']}: {result['examples']:,} examples of {report['data']} at "
        f"{report['image_size']} px, {report['num_classes']:,} classes"
    ]
    if report["left_out"]:
        lines.append(f"broken pictures that were left out: {report['left_out']:,}")
    if result.get("unknown"):
        lines.append(
            f"examples of classes that the network does not have: {result['unknown']:,}; they "
            "count as wrong and are left out of the loss"
        )
    if other := report["other_names"]:
        lines.append(
            f"warning: the names of the classes differ, class {other['class']} is "
            f"{other['weights']!r} for the weights and {other['data']!r} in the data: they are "
            "compared by their numbers"
        )
    lines += ["", " " * 16 + "".join(f"{name:>18}" for name in results)]
    rows = (
        ("top-1", lambda r: f"{r['top1']:.4%}"),
        ("top-5", lambda r: f"{r['top5']:.4%}"),
        ("loss", lambda r: f"{r['loss']:.6f}" if r["loss"] is not None else "-"),
        (f"ECE, {CALIBRATION_BINS} bins", lambda r: f"{r['ece']:.4%}"),
    )
    lines += [
        f"  {name:14}" + "".join(f"{value(each):>18}" for each in results.values())
        for name, value in rows
    ]
    if "classes" in result:
        name = list(results)[-1]
        lines += ["", *_class_table(result["classes"], report["labels"], of=name)]
    return "\n".join(lines)


def write(report: Report, folder: Path) -> str:
    """Writes eval.json, per_class.csv and confusion.png; returns a line that names them.

    Raises:
        UserError: the folder cannot be written.
    """
    result = chosen_result(report)
    names = ["eval.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "eval.json", report)
        if "classes" in result:
            with replacing(folder / "per_class.csv") as temporary:
                temporary.write_text(_class_csv(result["classes"], report["labels"]), "utf-8")
            from effv2_jax.report.confusion import draw_confusion  # here: loads matplotlib

            draw_confusion(folder / "eval.json", out=folder / "confusion.png")
            names += ["per_class.csv", "confusion.png"]
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return f"written to {folder}: {', '.join(names)}"


def _class_table(rows: Sequence[Report], labels: Sequence[str] | None, *, of: str) -> list[str]:
    present = [row for row in rows if row["examples"]]
    absent = len(rows) - len(present)
    ranked = sorted(present, key=lambda row: (row["accuracy"], -row["examples"], row["index"]))
    head = f"  {'class':{_NAME}} {'examples':>8} {'accuracy':>9}  most often taken for"
    if len(present) <= _FEW:
        title, parts = "classes, worst first", [ranked]
    else:
        title = f"the {_SHOWN} worst and the {_SHOWN} best of {len(present):,} classes"
        parts = [ranked[:_SHOWN], ranked[-_SHOWN:]]
    lines = [f"{title} ({of}):", head]
    for number, part in enumerate(parts):
        lines += ["  ..."] if number else []
        lines += [_class_line(row, labels) for row in part]
    if absent:
        lines.append(f"  {absent:,} classes have no examples here")
    return lines


def _class_line(row: Report, labels: Sequence[str] | None) -> str:
    mistake = ""
    if row["mistaken"]:
        mistake = f"{_name(row['mistaken_for'], labels)} ({row['mistaken']:,})"
    line = f"  {_name(row['index'], labels):{_NAME}} {row['examples']:8,} {row['accuracy']:9.2%}"
    return f"{line}  {mistake}".rstrip()


def _name(index: int, labels: Sequence[str] | None) -> str:
    name = str(index) if labels is None or index >= len(labels) else labels[index]
    if len(name) > _NAME:
        name = without_synset(name)
    return name if len(name) <= _NAME else f"{name[: _NAME - 3]}..."


def _class_csv(rows: Sequence[Report], labels: Sequence[str] | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("examples", "right", "accuracy", "answered", "precision", "mistaken_for", "mistaken")
    writer.writerow(("class", "label", *columns))
    for row in rows:
        label = "" if labels is None or row["index"] >= len(labels) else labels[row["index"]]
        cells = ["" if row[name] is None else row[name] for name in columns]
        writer.writerow((row["index"], label, *cells))
    return text.getvalue()
