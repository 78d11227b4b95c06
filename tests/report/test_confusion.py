"""The picture of the confusions, for few and for many classes."""

import json

import numpy as np
import pytest
from PIL import Image

from effv2_jax.errors import UserError
from effv2_jax.report import confusion


def write_report(path, num_classes, *, labels=True, examples=20):
    rng = np.random.default_rng(0)
    counts = {}
    for label in range(num_classes):
        for _ in range(examples):
            best = label if rng.random() < 0.8 else int(rng.integers(num_classes))
            counts[label, best] = counts.get((label, best), 0) + 1
    rows = []
    for index in range(num_classes):
        right = counts.get((index, index), 0)
        answered = sum(n for (_, best), n in counts.items() if best == index)
        rows.append({"index": index, "examples": examples, "right": right,
                     "answered": answered, "accuracy": right / examples})  # fmt: skip
    result = {
        "top1": 0.8,
        "examples": num_classes * examples,
        "classes": rows,
        "confusions": [[a, b, n] for (a, b), n in sorted(counts.items())],
    }
    report = {
        "model": "testing",
        "labels": [f"a class of number {i} $x" for i in range(num_classes)] if labels else None,
        "results": {"raw weights": result},
    }
    path.write_text(json.dumps(report))
    return path


@pytest.mark.parametrize(
    ("num_classes", "labels"), [(2, True), (10, True), (40, False), (41, True), (300, False)]
)
def test_any_number_of_classes_is_drawn(tmp_path, num_classes, labels):
    report = write_report(tmp_path / "eval.json", num_classes, labels=labels, examples=5)
    picture = Image.open(confusion.draw_confusion(report))
    assert picture.width >= 500
    assert picture.height >= 400
    assert picture.width < 2500
    assert picture.height < 2500


def test_matrix_has_every_count_at_its_place(tmp_path):
    report = json.loads(write_report(tmp_path / "eval.json", 4).read_text())
    result = report["results"]["raw weights"]
    figure = confusion._draw_matrix(report, result, range(4))
    texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in figure.axes[0].texts}
    assert texts == {(a, b): str(n) for a, b, n in result["confusions"]}


def test_command_draws_beside_the_file_or_elsewhere(tmp_path, capsys):
    report = write_report(tmp_path / "eval.json", 3)
    assert confusion.main([str(report)]) == 0
    assert (tmp_path / "confusion.png").is_file()
    assert confusion.main([str(report), "--out", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").is_file()
    report.write_text("{}")
    assert confusion.main([str(report)]) == 2
    assert "not the eval.json that --mode eval writes" in capsys.readouterr().err


def test_report_without_confusions_is_refused(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"results": {"raw weights": {"top1": 1.0}}}))
    with pytest.raises(UserError, match="several labels"):
        confusion.draw_confusion(path)


def test_long_names_of_imagenet_lose_their_synset_before_they_are_cut():
    labels = ["garbage truck (n03417042)", "tench (n01440764)", "American Staffordshire terrier"]
    names = [confusion._name({"labels": labels}, index) for index in range(3)]
    assert names == ["garbage truck", "tench (n01440764)", "American Staffordshir…"]
