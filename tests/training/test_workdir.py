"""The folder of a run: one run at a time, one config, files always whole."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from effv2_jax.config import base_config
from effv2_jax.errors import UserError
from effv2_jax.training.workdir import open_workdir, plain

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
    import os, sys, time
    from effv2_jax.config import base_config
    from effv2_jax.training.workdir import open_workdir
    with open_workdir(sys.argv[1], base_config()):
        print("locked", flush=True)
        if len(sys.argv) > 2:
            # The worker tells: whoever reads it knows that what runs at a fork has run.
            if not os.fork():
                print(os.getpid(), flush=True)
        time.sleep(60)
"""


def start_holder(path: Path, *, forked_worker: bool = False) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(path), *["fork"] * forked_worker],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_new_workdir_gets_config_and_plan(tmp_path):
    @dataclasses.dataclass
    class Row:
        index: int
        image_size: int

    config = base_config()
    with open_workdir(tmp_path / "a/b", config) as workdir:
        assert not workdir.resuming
        workdir.write_plan([Row(0, 128), Row(1, 300)], variant="efficientnetv2-s")
        assert json.loads((workdir.path / "config.json").read_text()) == plain(config)
        plan = json.loads((workdir.path / "plan.json").read_text())
    assert plan == {
        "variant": "efficientnetv2-s",
        "stages": [{"index": 0, "image_size": 128}, {"index": 1, "image_size": 300}],
    }


def test_same_config_resumes(tmp_path, capsys):
    with open_workdir(tmp_path, base_config()):
        pass
    with open_workdir(tmp_path, base_config()) as workdir:
        assert workdir.resuming
    assert capsys.readouterr().out == ""


def test_second_run_on_a_workdir_in_use_is_refused_and_names_the_first(tmp_path):
    holder = start_holder(tmp_path)
    try:
        with (
            pytest.raises(UserError, match=rf"in use by pid {holder.pid} on \S+, started "),
            open_workdir(tmp_path, base_config()),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_kill_9_frees_the_lock(tmp_path):
    holder = start_holder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert f"pid {holder.pid}" in (tmp_path / "LOCK").read_text()  # left behind, without a holder
    with open_workdir(tmp_path, base_config()) as workdir:
        assert workdir.resuming
        assert f"pid {os.getpid()}" in (tmp_path / "LOCK").read_text()


def test_forked_workers_that_outlive_a_killed_run_do_not_hold_its_lock(tmp_path):
    holder = start_holder(tmp_path, forked_worker=True)
    worker = int(holder.stdout.readline())
    try:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
        os.kill(worker, 0)  # it lives
        with open_workdir(tmp_path, base_config()):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), open_workdir(tmp_path, base_config()):
        _ = 1 / 0
    with open_workdir(tmp_path, base_config()):
        pass


def test_run_that_left_no_checkpoint_may_be_started_with_another_config(tmp_path):
    with open_workdir(tmp_path, base_config()):
        pass
    other = base_config()
    other.train.batch_size = 64  # the first one did not fit into memory
    with open_workdir(tmp_path, other) as workdir:
        assert not workdir.resuming
        saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["train"]["batch_size"] == 64


def test_other_config_is_refused_with_every_key_and_leaves_the_old_one(tmp_path):
    with open_workdir(tmp_path, base_config()):
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)
        before = (tmp_path / "config.json").read_text()
    other = base_config()
    other.train.seed = 7
    other.model.name = "efficientnetv2-m"
    other.runtime.keep_last = 9
    with pytest.raises(UserError) as caught, open_workdir(tmp_path, other):
        pass
    message = str(caught.value)
    assert "train.seed was 0, is 7" in message
    assert "model.name was 'efficientnetv2-s', is 'efficientnetv2-m'" in message
    assert "keep_last" not in message
    assert "another --workdir" in message
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("key", "value", "announced"),
    [
        ("runtime.keep_last", 9, False),
        ("data.workers", 3, False),
        ("data.dir", "/elsewhere", False),
        ("train.on_nonfinite", "skip", False),
        ("runtime.devices", 1, True),
        ("model.remat", True, True),
        ("eval.batch_size", 64, True),
    ],
)
def test_what_may_change_on_resume(tmp_path, key, value, announced):
    said = []
    with open_workdir(tmp_path, base_config()):
        pass
    config = base_config()
    config.update_from_flattened_dict({key: value})
    with open_workdir(tmp_path, config, say=said.append) as workdir:
        assert workdir.resuming
    assert [key in line for line in said] == [True] * announced
    section, name = key.split(".")
    assert json.loads((tmp_path / "config.json").read_text())[section][name] == value


def test_options_that_came_with_a_later_version_have_their_defaults(tmp_path):
    with open_workdir(tmp_path, base_config()):
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["train"]["gradient_clip"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_workdir(tmp_path, base_config()) as workdir:
        assert workdir.resuming
    del config["train"]["seed"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = base_config()
    other.train.seed = 1
    with pytest.raises(UserError, match=r"train\.seed was 0, is 1"), open_workdir(tmp_path, other):
        pass


def test_damaged_config_is_a_clear_error(tmp_path):
    with open_workdir(tmp_path, base_config()):
        pass
    (tmp_path / "config.json").write_text('{"model": ')
    with (
        pytest.raises(UserError, match=r"config\.json: not JSON"),
        open_workdir(tmp_path, base_config()),
    ):
        pass


def test_workdir_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--workdir .*file.*cannot be used"),
        open_workdir(tmp_path / "file", base_config()),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"--workdir gs://.*local"),
        open_workdir("gs://bucket/run", base_config()),
    ):
        pass
