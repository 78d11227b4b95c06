"""The list for a GPU: within its time, and nothing that was measured is lost; its parts."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import benchmark  # noqa: E402
from benchmarks import convolutions, gpu, grid, memory, step  # noqa: E402

from effv2_jax.command import Parser  # noqa: E402


def _job(name, **changes):
    arguments = ("input", "--help")
    return gpu.Job(**{
        "name": name, "title": name, "minutes": 1, "arguments": arguments, "tiny": arguments,
        **changes,
    })  # fmt: skip


def _flags(folder, minutes=30):
    return argparse.Namespace(out=folder, minutes=minutes, dry_run=True)


def test_every_command_of_the_list_has_arguments_that_are_right():
    parts = {"step": step, "convolutions": convolutions, "memory": memory}
    for job in gpu.jobs():
        for command in (job.arguments, job.tiny):
            if module := parts.get(command[0]):
                with pytest.raises(SystemExit) as ended:
                    module.run([*command[1:], "--json", "x.json", "--help"])
                assert ended.value.code == 0
            if command[0] == "step":
                flags = step.parse(command[1:])
                assert list(step.cases_of(flags))


def test_the_list_begins_with_what_matters_and_fits_into_its_time():
    listed = gpu.jobs()
    assert [job.name for job in listed[:2]] == ["s_train_300", "s_infer_384"]
    assert sum(job.minutes for job in listed[:4]) <= 30
    assert len({job.name for job in listed}) == len(listed)


def test_a_measurement_that_takes_too_long_is_ended_and_the_next_one_begins(tmp_path, monkeypatch):
    tool = tmp_path / "tools" / "benchmark.py"
    tool.parent.mkdir()
    tool.write_text(
        "import sys, time\nprint('begun', flush=True)\ntime.sleep(float(sys.argv[1]))\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(tool.parent / "benchmarks" / "gpu.py"))
    long, short = _job("long", minutes=0.1, tiny=("60",)), _job("short", tiny=("0",))
    failing = _job("failing", tiny=("never",))
    monkeypatch.setattr(gpu, "jobs", lambda: (long, short, failing))
    start = time.monotonic()
    gpu._run_all(_flags(tmp_path), None, start, "a machine")
    assert time.monotonic() - start < 30
    text = (tmp_path / "summary.txt").read_text()
    assert text.startswith("a machine\n")
    assert "long: stopped: its time was over" in text
    assert "short: done" in text
    assert "failing: failed, see failing.txt" in text
    assert (tmp_path / "long.txt").read_text() == "begun\n"
    assert "ValueError" in (tmp_path / "failing.txt").read_text()


def test_without_time_left_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "jobs", lambda: (_job("late"),))
    gpu._run_all(_flags(tmp_path, minutes=1), None, time.monotonic() - 30, "a machine")
    assert "late: not started: no time left" in capsys.readouterr().out


def test_larger_networks_try_only_what_was_faster_for_the_first(tmp_path):
    def chosen(candidate):
        record = {"kind": "step", "framework": "timm", "candidate": candidate}
        content = {"machines": [], "results": [record]}
        (tmp_path / "s_train_300.json").write_text(json.dumps(content))
        flags = _flags(tmp_path)
        flags.dry_run = False
        return gpu._way(flags)

    assert chosen("eager") == "off"
    assert chosen("compiled with CUDA graphs") == "on"
    (tmp_path / "s_train_300.json").unlink()
    assert gpu._way(argparse.Namespace(out=tmp_path, dry_run=False)) == "auto"


def test_the_largest_batch_leaves_room_and_is_a_multiple_of_eight():
    assert memory.largest(1e9, 0.1e9, 16) == 136  # 14.72 GB - 1 GB, by 0.1 GB
    assert memory.largest(1e9, 3e9, 16) == 4
    assert memory.largest(20e9, 1e9, 16) == 0


def test_shapes_are_those_of_the_network_each_once():
    found = convolutions.shapes_of("efficientnetv2-b0", 192, ["depthwise"])
    shape = {"type": "depthwise", "side": 24, "channels": 192, "filters": 192, "kernel": 3}
    assert {**shape, "stride": 2} in found
    assert {**shape, "side": 6, "channels": 1152, "filters": 1152, "stride": 1} in found
    assert len(found) == 6
    dense = convolutions.shapes_of("efficientnetv2-b0", 192, ["dense"])
    numbers = [(s["side"], s["channels"], s["filters"], s["stride"]) for s in dense]
    assert numbers == [
        (96, 32, 16, 1), (96, 16, 64, 2), (48, 32, 128, 1), (48, 32, 128, 2), (24, 48, 192, 1),
    ]  # fmt: skip
    pointwise = convolutions.shapes_of("efficientnetv2-b0", 192, ["pointwise"])
    assert [s["side"] for s in pointwise if s["channels"] == 1152] == [6]
    assert all(s["kernel"] == s["stride"] == 1 for s in pointwise)
    five = convolutions.shapes_of("efficientnet-b0", 224, ["depthwise"])
    assert {shape["kernel"] for shape in five} == {3, 5}


def test_the_grid_says_how_long_it_takes_and_measures_nothing(capsys):
    assert benchmark.main(["grid", "--estimate", "--cores", "1", "--peer-compile", "off"]) == 0
    assert "36 cases, very roughly" in capsys.readouterr().out


def test_an_estimate_grows_with_what_is_measured():
    def told(*more):
        parser = Parser("")
        grid.shared.add_cases(parser)
        step.add_flags(parser)
        flags = step.read_flags(parser, more)
        return step.estimate(list(step.cases_of(flags)), flags)

    assert told("--seconds", "60") == "2 cases, very roughly 0 h 11 min on an idle machine"
    assert told("--seconds", "60", "--peer", "timm", "--peer-compile", "off").endswith(
        "0 h 22 min on an idle machine"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grid",), "--json is missing"),
        (("gpu", "--out", "."), "is there and not empty"),
        (("memory", "--batch", "8"), "expected two, such as 16,32"),
        (("convolutions", "--lowering", "cudnn"), "'cudnn'; expected auto, plain, cpu"),
        (("end-to-end", "--batch", "8,16"), "--batch: several; expected one"),
        (("end-to-end", "--set", "data.workers"), "expected KEY=VALUE"),
        (("end-to-end", "--set", "data.worker=2"), "unknown key --config.data.worker"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_grid_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "grid.json").write_text("kept")
    assert benchmark.main(["grid", "--json", str(tmp_path / "grid.json")]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert (tmp_path / "grid.json").read_text() == "kept"


@pytest.mark.slow
def test_the_whole_list_runs_on_any_machine(tmp_path):
    assert benchmark.main(["gpu", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    text = (tmp_path / "out" / "summary.txt").read_text()
    for job in gpu.jobs():
        assert f"{job.title}: done" in text
        assert (tmp_path / "out" / f"{job.name}.json").exists()
