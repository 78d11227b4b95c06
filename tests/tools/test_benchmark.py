"""The benchmarks: what they report, and what they say of wrong arguments."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import benchmark  # noqa: E402


def _benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "tools/benchmark.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "EFFV2_NO_TUNE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_training_and_inference_are_measured_and_every_number_is_written(tmp_path):
    file, table = tmp_path / "result.json", tmp_path / "result.csv"
    arguments = (
        *("step", "--model", "testing", "--image-size", "32", "--batch", "4", "--devices", "2"),
        *("--rounds", "3", "--steps", "1", "--cache"),
        *("--json", str(file), "--csv", str(table)),
    )
    done = _benchmark(*arguments)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    (machine,) = content["machines"]
    assert machine["devices"] == 2
    assert machine["matmul_flops"]["float32"] > 0
    assert machine["copy_bytes"] > 0
    assert "none (refused)" in done.stdout
    train, infer = content["results"]
    assert (train["mode"], infer["mode"]) == ("train", "infer")
    for result in (train, infer):
        low, high = result["range"]
        assert 0 < low <= result["images_per_second"] <= high
        assert len(result["rounds"]) == 3
        assert result["program_bytes"] > 0
        assert result["resident_bytes"] > 0
        assert result["step_bytes"] >= 0
        assert result["compile_seconds"] > 0
        assert result["xla"]["flops"] > 0
        assert result["share_of_matmul"] > 0
        assert result["param_count"] == 65_536
    assert train["operations_per_image"] == 3 * infer["operations_per_image"]

    (row,) = csv.DictReader(table.open())
    assert row["model"] == "testing"
    assert float(row["train_samples_per_sec"]) == round(train["images_per_second"], 2)
    assert float(row["infer_step_time"]) == round(infer["step_ms"], 3)
    assert (row["infer_batch_size"], row["train_img_size"]) == ("4", "32")
    assert row["param_count"] == "0.07"

    again = _benchmark(*arguments, "--resume")
    assert again.returncode == 0
    assert "images/s" not in again.stdout  # nothing was missing
    assert json.loads(file.read_text()) == content


def test_inference_of_a_picture_alone_is_measured_on_one_device_of_several(tmp_path):
    file = tmp_path / "result.json"
    done = _benchmark(
        *("step", "--model", "testing", "--image-size", "32", "--batch", "1", "--mode", "infer"),
        *("--rounds", "1", "--steps", "1", "--cache", "--json", str(file)),
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["machines"][0]["devices"] > 1
    assert content["results"][0]["devices"] == 1


@pytest.mark.slow
def test_lowerings_are_measured_in_turns(tmp_path):
    file = tmp_path / "result.json"
    done = _benchmark(
        *("step", "--model", "testing", "--image-size", "32", "--batch", "4", "--devices", "1"),
        *("--lowering", "plain,cpu,cpu+remat", "--mode", "train", "--rounds", "3", "--steps", "1"),
        *("--json", str(file)),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    assert [r["lowering"] for r in results] == ["plain", "cpu", "cpu+remat"]
    assert all(result["in_turns"] for result in results)
    assert [len(r.get("pairs", ())) for r in results] == [0, 3, 3]
    assert done.stdout.count("effv2_jax plain / effv2_jax cpu = ") == 1
    # Forward convolutions of the blocks appear once more.
    assert results[2]["xla"]["flops"] > 1.1 * results[1]["xla"]["flops"]


@pytest.mark.slow
def test_a_recipe_is_measured_at_the_sizes_and_batches_of_its_stages(tmp_path):
    file = tmp_path / "result.json"
    done = _benchmark(
        *("step", "--recipe", "configs/digits.py", "--devices", "1", "--rounds", "1"),
        *("--steps", "1", "--cache", "--json", str(file)),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    assert [(r["image_size"], r["batch"], r["stage"]) for r in results] == [
        (20, 64, 0),
        (26, 64, 1),
        (32, 64, 2),
    ]
    assert "configs/digits.py stage 3" in done.stdout


@pytest.mark.slow
def test_parts_of_a_network_are_measured_alone(tmp_path):
    file = tmp_path / "result.json"
    arguments = (
        *("block", "--model", "testing", "--image-size", "32", "--batch", "4", "--cache"),
        *("--rounds", "2", "--seconds", "0.01", "--json", str(file)),
    )
    done = _benchmark(*arguments)
    assert done.returncode == 0, done.stderr
    assert "sum of all blocks" in done.stdout
    found = json.loads(file.read_text())["results"]
    assert len(found) == 3 * 8  # parts of the network, each in three ways
    for infer, _, train in zip(*(iter(found),) * 3, strict=True):
        assert 0 < infer["bound_ms"] < train["bound_ms"]
        assert min(infer["ms"], train["ms"]) > 0
    again = _benchmark(*arguments, "--resume")
    assert "blocks" not in again.stdout


@pytest.mark.slow
def test_the_kernels_of_a_step_are_found_and_are_the_networks(tmp_path):
    file = tmp_path / "result.json"
    done = _benchmark(
        *("roofline", "--model", "testing", "--image-size", "64", "--batch", "8", "--devices"),
        *("1", "--cache", "--rounds", "2", "--steps", "4", "--json", str(file)),
    )
    assert done.returncode == 0, done.stderr
    for record in json.loads(file.read_text())["results"]:
        layers = {layer for layer, *_ in record["kernels"]}
        kinds = {"stem", "dense", "pointwise", "depthwise", "head", "classifier"}
        assert layers >= kinds == set(record["layers"])
        passes = {kernel[2] for kernel in record["kernels"]}
        assert passes == ({"forward", "backward"} if record["mode"] == "train" else {"forward"})
        rest = sum(ms for layer, *_, ms in record["kernels"] if layer == "rest")
        assert rest < 0.5 * record["wall_ms"]
    assert "spent on" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stap",), "unknown part 'stap'"),
        (("step", "--model", "efficientnetv2-x"), "efficientnetv2-x"),
        (("step", "--batch", "8,many"), "'8,many'"),
        (("step", "--batch", "0"), "--batch is 0"),
        (("step", "--dtype", "float8"), "'float8'; expected float32, bfloat16"),
        (("step", "--lowering", "fast"), "'fast'; expected auto, plain, cpu, gpu"),
        (("step", "--speed", "11"), "--speed"),
        (("step", "--json", "no/such/folder/x.json"), "there is no folder"),
        (("step", "--resume"), "name it with --json"),
        (("step", "--cores", "1000"), "'1000'; expected 1 to"),
        (("step", "--peer", "mxnet"), "'mxnet'; expected timm, torchvision"),
        (("step", "--peer", "torchvision"), "it has no efficientnetv2-b0"),
        (("step", "--peer", "timm", "--recipe", "official"), "peers train with plain SGD"),
        (("block", "--lowering", "fast"), "'fast'; expected auto, plain, cpu"),
        (("roofline", "--mode", "both"), "'both'; expected train, infer"),
        (("loader", "--peer", "torch"), "'torch'; expected tf-data, timm"),
        (("loader", "--decoder", "turbo"), "'turbo'; expected pillow, simplejpeg"),
        (("loader", "--dir", "tests/models"), "there is no folder train in it"),
        (("loader", "--peer", "timm", "--peer-python", "no/such"), "no/such is no Python"),
        (("step", "--recipe", "configs/v3.py"), "no config file 'configs/v3.py'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


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


def test_whole_input_pipelines_are_measured(tmp_path):
    from PIL import Image

    for name in ("bee/1.jpg", "bee/2.jpg", "ant/3.jpg"):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200, 100, 50)).save(file)
    result = tmp_path / "loader.json"
    arguments = (
        *("loader", "--dir", str(tmp_path), "--decoder", "pillow", "--image-size", "16"),
        *("--batch", "64", "--cores", "1", "--rounds", "2", "--steps", "2", "--json", str(result)),
    )
    done = _benchmark(*arguments)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(result.read_text())["results"]
    assert record["candidate"] in ("1 threads", "1 processes")
    assert set(record["tried"]) == {"1 threads", "1 processes"}
    low, high = record["range"]
    assert 0 < low <= record["images_per_second"] <= high
    assert "effv2_jax pillow" in done.stdout

    again = _benchmark(*arguments, "--resume")
    assert (again.returncode, again.stdout) == (0, "")
