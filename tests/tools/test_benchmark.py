"""The benchmarks: what they report, and what they say of wrong arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def _benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "tools/benchmark.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "EFFV2_NO_TUNE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_variants_are_measured_in_turns_and_every_number_is_written(tmp_path):
    file = tmp_path / "result.json"
    done = _benchmark(
        *("step", "--model", "testing", "--image-size", "32", "--batch", "4", "--devices", "2"),
        *("--lowering", "plain,cpu", "--rounds", "3", "--steps", "1", "--json", str(file)),
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["environment"]["devices"] == 2
    assert content["environment"]["matmul_peak_gflops"]["float32"] > 0
    assert "tuning: none (refused)" in done.stdout
    results = content["results"]
    kinds = [("train", "plain"), ("train", "cpu"), ("infer", "plain"), ("infer", "cpu")]
    assert [(r["mode"], r["lowering"]) for r in results] == kinds
    for result in results:
        low, high = result["range"]
        assert 0 < low <= result["images_per_second"] <= high
        assert len(result["rounds"]) == 3
        assert result["memory_bytes"] > 0
        assert result["compile_seconds"] > 0
        assert 0 < result["share_of_peak"] < 1
    assert results[0]["multiply_adds_per_image"] == 3 * results[2]["multiply_adds_per_image"]
    for mode in ("train", "infer"):
        assert f"{mode}: cpu / plain = " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stap",), "unknown part 'stap'"),
        (("step", "--model", "efficientnetv2-x"), "efficientnetv2-x"),
        (("step", "--batch", "8,many"), "'8,many'"),
        (("step", "--batch", "0"), "--batch is 0"),
        (("step", "--dtype", "float8"), "'float8'; expected float32, bfloat16"),
        (("step", "--lowering", "fast"), "'fast'; expected auto, plain, cpu"),
        (("step", "--speed", "11"), "--speed"),
        (("step", "--json", "no/such/folder/x.json"), "does not exist"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message):
    done = _benchmark(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_augmentation_is_measured_per_operation():
    done = _benchmark("augment", "--sizes", "16", "--batch", "2", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"}
    assert {"Rotate", "Equalize", "RandAugment(2)", "AutoAugment", "mixup", "cutmix"} <= rows


def test_every_part_of_the_input_pipeline_is_measured():
    done = _benchmark("input", "--seconds", "0.01", "--sizes", "32", "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    for part in ("read", "decode, pillow", "crop and resize to 32", "transfer of 32 px", "loader"):
        assert part in done.stdout
