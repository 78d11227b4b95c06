"""Pictures and tables of measurements, from the files that parts of the benchmark write."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import benchmark  # noqa: E402
from benchmarks import counts, pictures, roofline  # noqa: E402
from benchmarks.block import parts_of  # noqa: E402
from benchmarks.results import Case  # noqa: E402

MODEL = "efficientnetv2-b0"
COMMON = {"model": MODEL, "image_size": 192, "batch": 8, "dtype": "float32", "cores": 1}


def _step(size, batch, mode, framework, rate):
    record = {
        **COMMON, "kind": "step", "image_size": size, "batch": batch, "mode": mode,
        "recipe": "plain", "stage": None, "framework": framework, "lowering": None,
        "images_per_second": rate, "range": [0.9 * rate, 1.1 * rate], "device": "cpu",
        "versions": {"python": "3"}, "settings": "as shipped", "in_turns": True,
    }  # fmt: skip
    return record if framework == "effv2_jax" else record | {"ratio": [120 / rate, 1, 2]}


def _steps():
    rates = {"effv2_jax": 120.0, "timm": 100.0, "keras-tf": 80.0}
    return [
        _step(size, batch, mode, name, rate)
        for size, batch, mode, (name, rate) in itertools.product(
            (128, 192), (8, 16), ("train", "infer"), rates.items()
        )
    ]


def _blocks():
    return [
        {
            **COMMON, "kind": "block", "part": part.name, "block": part.block, "count": part.count,
            "input": part.input, "pass": kind, "ms": ms, "bound_ms": 1.0,
        }
        for part in parts_of(MODEL, 192)
        for kind, ms in (("infer", 2.0), ("forward", 2.5), ("train", 8.0))
    ]  # fmt: skip


def _roofline(mode):
    case = Case(**COMMON, mode=mode)
    layers = roofline.layer_bounds(case, counts.Rates(1e11, 2e10))
    kernels = [
        [kind, "convolution", "forward", 2 * row["bound_ms"]] for kind, row in layers.items()
    ]
    return {
        **COMMON, "kind": "roofline", "mode": mode, "layers": layers, "kernels": kernels,
        "matmul_flops": 1e11, "copy_bytes": 2e10, "wall_ms": 100.0,
        "step_ms": 2.5 * sum(row["bound_ms"] for row in layers.values()),
    }  # fmt: skip


def _machine(load, rate):
    return {
        "device": "cpu", "devices": 1, "processor": "x", "cores": 1, "jax": "1", "jaxlib": "1",
        "tuning": "none", "load": load, "matmul_flops": {"float32": rate}, "copy_bytes": 2e10,
    }  # fmt: skip


def _file(path, records, machines=()):
    path.write_text(json.dumps({"machines": list(machines), "results": records}))
    return str(path)


def test_every_kind_of_measurement_has_its_picture(tmp_path):
    file = _file(
        tmp_path / "x.json", [*_steps(), *_blocks(), _roofline("infer"), _roofline("train")]
    )
    assert benchmark.main(["draw", file, "--out", str(tmp_path / "out")]) == 0
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    case = f"{MODEL}_192px_batch8_float32_1core"
    assert names == {
        f"size_{MODEL}_float32", f"batch_{MODEL}_float32", f"blocks_{case}", f"roofline_{case}",
    }  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("L").getcolors(256)) > 20  # something is drawn


def test_speed_is_drawn_with_a_line_per_framework_and_the_range_of_its_rounds():
    chosen = [record for record in _steps() if record["batch"] == 8]
    training, inference = pictures.speed(chosen, "image_size").axes
    for axis in (training, inference):
        assert [line.get_label() for line in axis.containers] == ["effv2_jax", "timm", "keras-tf"]
        assert list(axis.containers[0].lines[0].get_xdata()) == [128, 192]
        assert axis.get_ylim()[0] < 0.9 * 80
        assert axis.get_ylim()[1] > 1.1 * 120


def test_bars_of_parts_are_all_their_blocks_together():
    axis = pictures.blocks(_blocks()).axes[0]
    forward, backward = axis.containers
    counts_ = [part.count for part in parts_of(MODEL, 192)]
    assert [bar.get_width() for bar in forward] == [2.5 * count for count in counts_]
    assert [bar.get_width() for bar in backward] == [5.5 * count for count in counts_]


def test_tables_have_the_ratios_and_how_the_fastest_peer_stands(tmp_path, capsys):
    file = _file(tmp_path / "x.json", [*_steps(), *_blocks(), _roofline("train")])
    assert benchmark.main(["tables", file]) == 0
    text = capsys.readouterr().out
    line = "| 128 | 8 | 1 | train | 120.0 (108.0 - 132.0) | 100.0 (90.0 - 110.0) "
    assert line in text
    assert "| 1.20 (1.00 - 2.00) | 1.50 (1.00 - 2.00) |" in text
    assert "of 8 cases: median 1.20 (1.20 - 1.20)." in text
    assert "| stem: Conv, 3x3, stride 2 | 1 | 192 x 192 x 3 | 2.00 | 50% |" in text
    assert "| convolution | " in text
    assert text.count("| the step | ") == 1


def test_tables_of_several_networks_and_times_are_summed_up(tmp_path, capsys):
    others = [{**record, "model": "efficientnetv2-s"} for record in _steps()]
    times = [_machine(0.5, 1.1e11), _machine(None, 9e10), {**_machine(0.1, 2e11), "cores": 2}]
    times[1]["matmul_flops"]["bfloat16"] = 5e10
    assert benchmark.main(["tables", _file(tmp_path / "x.json", _steps() + others, times)]) == 0
    text = capsys.readouterr().out
    assert text.count("(x)") == 2
    assert "(x), 1 of its cores, load 0.5; " in text
    assert (
        "measured: matrix products float32 90 to 110, bfloat16 50 GFLOP/s, copies 20.0 GB/s" in text
    )
    assert "All networks together. Against the fastest peer of each of 16 cases" in text
    assert "| network | type | 1 core, train | 1 core, infer |" in text
    least = "1.20 (1.20 - 1.20) [4]"
    assert f"| efficientnetv2-s | float32 | {least} | {least} |" in text


@pytest.mark.parametrize("part", ["draw", "tables"])
def test_a_file_without_results_is_refused(part, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")] if part == "draw" else []
    assert benchmark.main([part, _file(tmp_path / "x.json", []), *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.json" in line
