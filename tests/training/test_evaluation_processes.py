"""--mode eval in several real processes: each example counts once, whoever has read it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.pictures import class_folders, write_tree
from tests.inference.networks import write_weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
_CONFIG = """
from tests.training import tiny


def get_config():
    return tiny.tiny_config(**{
        "data.source": "folder", "data.workers": 0, "data.on_corrupt": "skip",
        "eval.image_size": None, "eval.batch_size": 4, "runtime.devices": 0,
    })
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command without --workdir: 24 photos of three classes, one of them broken."""
    folder = tmp_path_factory.mktemp("data")
    class_folders(folder / "photos" / "val", {"ant": 9, "bee": 6, "cat": 8})
    write_tree(folder / "photos", {"val/bee/broken.png": b"no picture"})
    weights = write_weights(folder / "w.safetensors")
    (folder / "config.py").write_text(_CONFIG)
    return [
        *(sys.executable, "-m", "effv2_jax.main", "--config", str(folder / "config.py")),
        *("--mode", "eval", "--no-tune"),
        f"--config.data.dir={folder / 'photos'}",
        f"--config.init.weights={weights}",
    ]


def evaluate(command, workdir, *, processes):
    """Returns eval.json and what each of the processes printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index in range(processes):
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        if processes > 1:
            environment["JAX_COORDINATOR_ADDRESS"] = address
            environment["JAX_NUM_PROCESSES"] = str(processes)
            environment["JAX_PROCESS_ID"] = str(index)
        started.append(
            subprocess.Popen(
                [*command, "--workdir", str(workdir)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        )
    try:
        printed = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, printed
    return json.loads((workdir / "eval" / "eval.json").read_text()), printed


def test_two_processes_count_what_one_counts(command, tmp_path):
    one, _ = evaluate(command, tmp_path / "one", processes=1)
    two, (first, second) = evaluate(command, tmp_path / "two", processes=2)
    assert one["left_out"] == two["left_out"] == 1
    alone, both = (report["results"]["weights"] for report in (one, two))
    assert alone["examples"] == 23
    for exact in ("examples", "top1_right", "top5_right", "classes", "confusions"):
        assert both[exact] == alone[exact], exact
    assert [b["count"] for b in both["calibration"]] == [b["count"] for b in alone["calibration"]]
    for rounded in ("loss", "ece"):  # other batches: other order of float32 sums
        assert both[rounded] == pytest.approx(alone[rounded], rel=1e-5), rounded
    assert "written to" in first
    assert "written to" not in second  # one process writes
