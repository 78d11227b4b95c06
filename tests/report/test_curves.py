"""The picture shows what the file says, for whole, short and broken files."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text

from effv2_jax.errors import UserError
from effv2_jax.report.curves import draw_curves, plot_curves
from effv2_jax.report.run import read_run

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder: Path, sizes=(128, 192, 256), *, per_stage: int = 10, **left_out) -> Path:
    """A run of one epoch a stage, with as many train records and two evaluations a stage."""
    records = []
    for stage, size in enumerate(sizes):
        for i in range(1, per_stage + 1):
            epoch = stage + i / per_stage
            common = {
                "step": round(100 * epoch),
                "epoch": epoch,
                "stage": stage,
                "image_size": size,
            }
            train = {"loss": 3 - 0.5 * epoch, "top1": 0.2 * epoch, "learning_rate": 0.1 / epoch}
            records.append({**common, "split": "train", **train})
            if i in (per_stage // 2, per_stage):
                scores = {"loss": 2 - 0.4 * epoch, "top1": 0.25 * epoch, "ema_top1": 0.3 * epoch}
                records.append({**common, "split": "eval", **scores, "ema_loss": 1.9})
    for record in records:
        for key in left_out:
            record.pop(key, None)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def panels(figure) -> dict:
    return {axis.get_ylabel(): axis for axis in figure.axes}


def lines(axis) -> dict:
    return {line.get_label(): list(line.get_xydata()) for line in axis.get_lines()}


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_lines_are_the_numbers_of_the_file(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    axes = panels(draw_curves([run]))
    assert list(axes) == ["loss", "top-1", "learning rate"]
    for name, split, key, label in (
        ("loss", "train", "loss", "training"),
        ("loss", "eval", "ema_loss", "evaluation, moving average"),
        ("top-1", "eval", "top1", "evaluation, raw weights"),
        ("top-1", "eval", "ema_top1", "evaluation, moving average"),
        ("learning rate", "train", "learning_rate", "learning rate"),
    ):
        drawn = [tuple(point) for point in lines(axes[name])[label]]
        assert drawn == [(r["epoch"], r[key]) for r in run.records if r["split"] == split]


def test_stages_are_labelled_and_the_best_is_named(tmp_path):
    figure = draw_curves([read_run(write_run(tmp_path / "my-run"))])
    shown = texts(figure)
    assert {"128 px", "192 px", "256 px"} <= set(shown)
    assert "best 90.00%" in shown
    assert "my-run" in shown
    assert any(text.startswith("300 steps   3 epochs   final top-1 90.00%") for text in shown)


def test_stages_span_the_run_without_gaps(tmp_path):
    assert read_run(write_run(tmp_path / "run")).stages() == [
        (0, 1, 128),
        (1, 2, 192),
        (2, 3, 256),
    ]


def test_many_points_are_smoothed_within_their_stage(tmp_path):
    run = read_run(write_run(tmp_path / "run", per_stage=100))
    drawn = lines(panels(draw_curves([run]))["top-1"])["training"]
    assert len(drawn) == 300
    for epoch, value in drawn:
        # Half a window of 7 of 100 points a stage at 0.2 an epoch; linear data keep their mean.
        assert value == pytest.approx(0.2 * epoch, abs=0.2 * 0.03 / 2 + 1e-9)


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ({"learning_rate"}, ["loss", "top-1"]),
        ({"top1", "ema_top1"}, ["loss", "learning rate"]),
        ({"ema_top1", "ema_loss"}, ["loss", "top-1", "learning rate"]),
        ({"loss", "ema_loss", "top1", "ema_top1", "learning_rate"}, ["loss"]),
        ({"stage", "image_size"}, ["loss", "top-1", "learning rate"]),
    ],
)
def test_missing_keys_leave_out_their_panel_only(tmp_path, missing, expected):
    folder = write_run(tmp_path / "run", **dict.fromkeys(missing))
    assert list(panels(draw_curves([read_run(folder)]))) == expected
    assert imread(plot_curves(folder)).shape[2] == 4


@pytest.mark.parametrize(
    "content",
    [
        '{"step": 1, "epoch": 0.1, "split": "train", "loss": 2.5}\n',
        '{"step": 0, "epoch": 0.0, "split": "eval", "loss": 2.5, "top1": 0.0}\n',
        '{"step": 1, "epoch": 0.1, "split": "train", "loss": null, "nonfinite": ["loss"]}\n',
        '{"step": 1, "epoch": 0.1, "split": "train", "loss": 2.5}\n{"step": 2, "epo',
        '{"step": 1, "epoch": 0.1, "split": "train", "loss": 2.5}\n\x00\x00\n[]\n3\n',
    ],
)
def test_hardly_anything_in_the_file_is_still_a_picture(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert imread(plot_curves(tmp_path)).std() > 0


def test_not_finite_values_are_gaps(tmp_path):
    rows = [
        {"step": step, "epoch": step / 10, "split": "train", "loss": None if step == 3 else 1.0}
        for step in range(1, 6)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = lines(panels(draw_curves([read_run(tmp_path)]))["loss"])["training"]
    assert len(drawn) == 4
    assert all(math.isfinite(value) for _, value in drawn)


def test_several_runs_are_told_apart_by_name_and_colour(tmp_path):
    folders = [
        write_run(tmp_path / "progressive"),
        write_run(tmp_path / "fixed", sizes=(256,), ema_top1=None, ema_loss=None),
    ]
    out = plot_curves(folders, out=tmp_path / "both.png")
    assert out == tmp_path / "both.png"
    figure = draw_curves([read_run(folder) for folder in folders])
    assert {"progressive: best 90.00%", "fixed: best 25.00%"} <= set(texts(figure))
    top1 = panels(figure)["top-1"].get_lines()
    assert len({line.get_color() for line in top1}) == 2
    assert "128 px" not in texts(figure)  # their stages differ


@pytest.mark.parametrize("sizes", [(128,), (128, 160, 192, 224), tuple(range(100, 148, 2))])
def test_texts_above_the_panels_do_not_run_into_each_other(tmp_path, sizes):
    figure = draw_curves([read_run(write_run(tmp_path / ("a-long-name-" * 12), sizes=sizes))])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axis = figure.axes[0]
    legend = axis.get_legend()
    above = [axis.title, axis._left_title, *axis.texts, *legend.get_texts()]
    boxes = [
        text.get_window_extent(canvas.get_renderer()) for text in above if text.get_text().strip()
    ]
    assert len(boxes) >= 5
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width


def test_no_run_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        plot_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1,')
    with pytest.raises(UserError, match="nothing measured yet"):
        plot_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_command_draws_without_a_display_and_reports_errors_in_one_line(tmp_path):
    def command(*arguments):
        environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
        return subprocess.run(
            [sys.executable, "-m", "effv2_jax.report.curves", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    folder = write_run(tmp_path / "run")
    done = command(folder)
    assert (done.returncode, done.stdout.strip()) == (0, str(folder / "curves.png"))
    failed = command(folder, tmp_path / "nothing", "--out", tmp_path / "x.png")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
