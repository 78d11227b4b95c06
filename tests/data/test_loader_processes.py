"""The loader with real worker processes. Each takes seconds to start, so they are few."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from effv2_jax.data.loader import train_batches
from effv2_jax.data.sources import open_source
from effv2_jax.errors import UserError
from tests.data import pictures
from tests.data.pictures import data_config as _config
from tests.data.test_loader import STAGES, Stage, _assert_equal, _batches


class BackendFree:
    """A source that complains if the process that reads it could take an accelerator."""

    def __init__(self, source):
        self._source = source
        self.num_classes, self.label_names = source.num_classes, source.label_names
        self.in_memory = source.in_memory

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if multiprocessing.parent_process() is None:
            raise UserError("read in the main process")
        jax = sys.modules.get("jax")  # Grain imports it
        if jax and (jax.config.jax_platforms != "cpu"):
            raise UserError("a worker has an accelerator within reach")
        return self._source[index]


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing_and_start_no_backend(workers, monkeypatch):
    data = _config(workers=workers, threads=2)
    source = open_source(data, "train")
    expected = _batches(_config())
    monkeypatch.setenv("JAX_PLATFORMS", "")  # as on a machine with an accelerator
    batches = train_batches(BackendFree(source), STAGES, data, seed=0, start_step=0, stop_step=7)
    with batches:
        _assert_equal(list(batches), expected)


def test_a_workers_error_reaches_the_user_and_the_workers_end(tmp_path):
    pictures.class_folders(tmp_path, {"train/a": 4, "train/b": 4})
    (tmp_path / "train/b/002.png").write_bytes(b"text")
    data = _config("folder", tmp_path, workers=1)
    batches = train_batches(
        open_source(data, "train"), STAGES, data, seed=0, start_step=0, stop_step=7
    )
    with pytest.raises(UserError, match=r"train/b/002.png: cannot decode this image \(not an im"):
        list(batches)
    assert not _children()
    assert list(batches) == []


def _children():
    """Live direct children of this process, except Python's resource tracker."""
    own = str(os.getpid())
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            with open(f"/proc/{entry}/cmdline") as file:
                command = file.read()
        except OSError:
            continue
        if fields[1] == own and fields[0] != "Z" and "resource_tracker" not in command:
            found.append(command)
    return found


def test_a_worker_that_is_killed_is_reported():
    data = _config(workers=1)
    stages = (Stage(0, 16, 32, 0, 10_000, 0),)
    batches = train_batches(
        open_source(data, "train"), stages, data, seed=0, start_step=0, stop_step=10_000
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"loader process ended .* exit code -9.*data.workers"):
        list(batches)


PROGRAM = """
    import sys
    from effv2_jax.config import base_config
    from effv2_jax.data.loader import train_batches
    from effv2_jax.data.sources import open_source
    from tests.data.test_loader import STAGES

    if __name__ == "__main__":
        data = base_config().data
        data.source, data.workers = "digits", 1
        batches = train_batches(
            open_source(data, "train"), STAGES, data, seed=0, start_step=0, stop_step=7
        )
        next(batches)
        import multiprocessing
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        if sys.argv[1] == "wait":
            sys.stdin.read()
"""


def _program(tmp_path, argument):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return subprocess.Popen(
        [sys.executable, str(path), argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        text=True,
    )


def _ends(pid, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_a_program_that_forgets_to_close_ends(tmp_path):
    program = _program(tmp_path, "go")
    assert program.wait(timeout=60) == 0
    assert _ends(int(program.stdout.readline()))


def test_workers_outlive_signals_but_not_their_trainer(tmp_path):
    program = _program(tmp_path, "wait")
    worker = int(program.stdout.readline())
    # Preemption notices and Ctrl-C reach every process of the group.
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGINT)
    time.sleep(1)
    assert not _ends(worker, seconds=0.3)
    program.kill()
    program.wait()
    assert _ends(worker)
