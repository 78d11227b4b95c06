"""Checkpoints: same bits back, never lost, damaged or foreign ones noticed."""

import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effv2_jax.errors import UserError
from effv2_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]


class State(flax.struct.PyTreeNode):
    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict | None
    skipped: jax.Array


def make_state(step: int, *, width: int = 5, ema: bool = True) -> State:
    rng = np.random.default_rng(step)
    params = {
        "stem": {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, width)), jnp.float32)}},
        "head": {"bias": jnp.asarray(rng.normal(size=width), jnp.bfloat16)},
    }
    return State(
        step=jnp.int32(step),
        params=params,
        opt_state=(jax.tree.map(jnp.square, params), (), {"empty": jnp.zeros((0, 3))}),
        ema={"params": jax.tree.map(lambda p: p * 0.5, params), "batch_stats": {}} if ema else None,
        skipped=jnp.int32(0),
    )


def same_bits(a: State, b: State) -> bool:
    left, right = jax.tree.flatten(a), jax.tree.flatten(b)
    return left[1] == right[1] and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(left[0], right[0], strict=True)
    )


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    with Checkpoints(tmp_path / "checkpoints", say=said.append) as opened:
        yield opened


def save(checkpoints, step, **metrics):
    assert checkpoints.save(step, make_state(step), metrics)
    checkpoints.wait_until_finished()


DAMAGES = {
    "truncated": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "empty": lambda path, content: path.write_bytes(b""),
    "deleted": lambda path, content: path.unlink(),
    "flipped": lambda path, content: path.write_bytes(bytes(byte ^ 1 for byte in content)),
}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(folder: Path) -> None:
    for path in files_of(folder / "state"):
        path.write_bytes(path.read_bytes()[:-1])


def test_restored_state_has_the_same_bits_and_structure(checkpoints):
    state = make_state(7)
    odd = jnp.asarray([np.nan, -0.0, np.inf, 1e-45, 3.0], jnp.float32)
    state = state.replace(ema={"params": odd, "batch_stats": {}})
    checkpoints.save(7, state)
    checkpoints.wait_until_finished()
    assert same_bits(checkpoints.restore(jax.eval_shape(lambda: state)), state)


def test_nothing_to_restore_is_none(checkpoints):
    assert checkpoints.restore(make_state(0)) is None
    assert checkpoints.latest_step is None
    assert checkpoints.best_step is None


def test_saved_state_is_that_of_the_call_although_the_next_step_takes_its_buffers(checkpoints):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = make_state(1)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(1, state)
    for _ in range(20):  # the writer is still reading while these overwrite the buffers
        state = advance(state)
    jax.block_until_ready(state)
    checkpoints.wait_until_finished()
    assert same_bits(checkpoints.restore(make_state(1)), expected)


def test_last_and_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, top1 in ((1, 0.2), (2, 0.9), (3, 0.4), (4, 0.3), (5, None), (6, 0.5)):
            save(checkpoints, step, **({} if top1 is None else {"top1": top1}))
        assert checkpoints.steps == [2, 5, 6]
        assert checkpoints.best_step == 2
        assert checkpoints.latest_step == 6


def test_ema_top1_ranks_before_top1_and_nan_does_not_rank(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        save(checkpoints, 1, top1=0.1, ema_top1=0.9)
        save(checkpoints, 2, top1=0.95, ema_top1=0.5)
        save(checkpoints, 3, top1=float("nan"))
        assert checkpoints.steps == [1, 3]


def test_best_is_remembered_by_the_next_process(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        save(checkpoints, 1, top1=0.9)
        save(checkpoints, 2, top1=0.1)
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        save(checkpoints, 3, top1=0.2)
        assert checkpoints.steps == [1, 3]


def test_second_save_of_a_step_only_notes_its_metrics(checkpoints):
    save(checkpoints, 4)
    assert not checkpoints.save(4, make_state(5), {"top1": 0.5})
    assert checkpoints.best_step == 4
    assert same_bits(checkpoints.restore(make_state(0)), make_state(4))


def test_damaged_newest_falls_back_to_the_one_before(tmp_path, said):
    with Checkpoints(tmp_path, say=said.append) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    damage(tmp_path / "2")
    with Checkpoints(tmp_path, say=said.append) as checkpoints:
        assert same_bits(checkpoints.restore(make_state(0)), make_state(1))
        assert len(said) == 1
        assert "step 2 is damaged" in said[0]
        assert "\n" not in said[0]
        assert (tmp_path / "2.damaged").is_dir()
        save(checkpoints, 2)  # the number is free again
        assert same_bits(checkpoints.restore(make_state(0)), make_state(2))


# Orbax drops its other reads when one fails; their late answers warn.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", DAMAGES)
def test_no_damaged_file_gives_wrong_bits(tmp_path, how):
    """Each file of the newest in turn: it is either not needed, or the one before is used."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    fell_back = []
    for path in files_of(tmp_path / "2"):
        content = path.read_bytes()
        DAMAGES[how](path, content)
        with Checkpoints(tmp_path, say=fell_back.append) as checkpoints:
            state = checkpoints.restore(make_state(0))
        assert same_bits(state, make_state(int(state.step)))
        if state.step == 1:
            (tmp_path / "2.damaged").rename(tmp_path / "2")
        path.write_bytes(content)
    assert len(fell_back) >= 4  # the arrays, their index, their names, their checksums


def test_flipped_bit_that_orbax_accepts_is_noticed(tmp_path, said):
    """Among the arrays' bytes only the checksums see it: Orbax stores large arrays without."""
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=300_000), jnp.float32)}
    with Checkpoints(tmp_path, say=said.append) as checkpoints:
        checkpoints.save(1, state)
    path = max(files_of(tmp_path), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with Checkpoints(tmp_path, say=said.append) as checkpoints, pytest.raises(UserError):
        checkpoints.restore(state)
    assert "w has another checksum" in said[0]


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path, said):
    with Checkpoints(tmp_path, say=said.append) as checkpoints:
        save(checkpoints, 1)
    damage(tmp_path / "1")
    with (
        Checkpoints(tmp_path, say=said.append) as checkpoints,
        pytest.raises(UserError, match=r"none of the checkpoints \[1\] is usable"),
    ):
        checkpoints.restore(make_state(0))


def test_checkpoint_of_another_model_is_refused_with_all_differences(checkpoints):
    save(checkpoints, 1)
    other = make_state(1, width=6, ema=False)
    other = other.replace(params={**other.params, "extra": jnp.zeros(2)})
    with pytest.raises(UserError) as caught:
        checkpoints.restore(other)
    message = str(caught.value)
    assert "params/extra is missing" in message
    assert "ema/params/head/bias is not in this run's state" in message
    assert "params/head/bias is bfloat16[5], this run has bfloat16[6]" in message
    assert "another --workdir" in message
    assert checkpoints.steps == [1]  # it is somebody's good checkpoint: not set aside


def test_restored_onto_another_number_of_devices(checkpoints):
    def shardings(devices: int) -> dict:
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        return {"w": NamedSharding(mesh, P("data")), "step": NamedSharding(mesh, P())}

    state = {"w": jnp.arange(8, dtype=jnp.float32), "step": jnp.int32(3)}
    checkpoints.save(3, jax.device_put(state, shardings(4)))
    checkpoints.wait_until_finished()
    for devices in (4, 2, 1):
        wanted = shardings(devices)
        restored = checkpoints.restore(jax.eval_shape(lambda: state), sharding=wanted)
        assert {name: value.sharding for name, value in restored.items()} == wanted
        assert same_bits(restored, state)
        restored = checkpoints.restore(state, sharding=wanted["step"])  # one for all
        assert restored["w"].sharding == wanted["step"]
        restored = checkpoints.restore(jax.device_put(state, wanted))  # the template's
        assert restored["w"].sharding == wanted["w"]


def test_two_processes_save_restore_and_fall_back_together(tmp_path):
    script = """
        import os, sys
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        import jax, numpy as np
        from jax.experimental import multihost_utils
        from jax.sharding import NamedSharding, PartitionSpec as P
        from effv2_jax.training.checkpoint import Checkpoints
        from tests.training.test_checkpoint import damage
        folder, port, rank = __import__("pathlib").Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
        mesh = jax.make_mesh((4,), ("data",))
        shardings = {"whole": NamedSharding(mesh, P()), "split": NamedSharding(mesh, P("data"))}
        values = {"whole": np.arange(3.0, dtype="f4"), "split": np.arange(8, dtype="i4")}
        state = {
            name: jax.make_array_from_callback(v.shape, shardings[name], lambda i, v=v: v[i])
            for name, v in values.items()
        }
        with Checkpoints(folder, say=lambda text: print(text, flush=True)) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, state)
            checkpoints.wait_until_finished()
            if rank == 0:
                damage(folder / "2")
            multihost_utils.sync_global_devices("damaged")
            shapes = jax.eval_shape(lambda: state)
            restored = checkpoints.restore(shapes, sharding=shardings)
            assert checkpoints.steps == [1]
            for name, value in restored.items():
                assert value.sharding == shardings[name]
                for shard in value.addressable_shards:
                    np.testing.assert_array_equal(shard.data, values[name][shard.index])
        print("equal", rank, flush=True)
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c"), port, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for rank, (out, error) in enumerate(outputs):
        assert f"equal {rank}" in out, error
        assert out.count("step 2 is damaged") == (rank == 0)


def test_kill_9_during_a_save_leaves_a_usable_checkpoint(tmp_path):
    """A process that saves without pause is killed at five different moments."""
    script = """
        import sys, jax.numpy as jnp
        from effv2_jax.training.checkpoint import Checkpoints
        with Checkpoints(sys.argv[1], say=print) as checkpoints:
            template = {f"w{i}": jnp.zeros(20_000) for i in range(40)} | {"step": jnp.int32(0)}
            state = checkpoints.restore(template)
            step = 0 if state is None else int(state["step"])
            print("start", step, flush=True)
            while True:
                step += 1
                state = {f"w{i}": jnp.full(20_000, float(step + i)) for i in range(40)}
                checkpoints.save(step, state | {"step": jnp.int32(step)})
                print("handed over", step, flush=True)
    """
    starts, handed = [], 0
    for delay in (0.05, 0.11, 0.17, 0.23, None):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        lines = iter(process.stdout.readline, "")
        words = next(lines).split()
        assert words[0] == "start", words  # in particular: no line about damage
        starts.append(int(words[1]))
        # The newest may be lost, being written; the one before it is complete.
        assert starts[-1] >= handed - 1
        for line in lines:
            handed = int(line.split()[2])
            if handed >= starts[-1] + 3:
                break
        if delay is not None:
            time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        remaining = process.stdout.read().split("\n")[:-1]  # a line may have been cut off
        handed = max([handed, *(int(r.split()[2]) for r in remaining if r.startswith("handed"))])
        process.wait()
        process.stdout.close()
    assert starts == sorted(starts)
    assert starts[-1] > 0


def test_full_disk_is_reported_and_the_older_checkpoint_stays(tmp_path):
    """A file-size limit stands for the full disk: the same kind of failing write."""
    script = """
        import resource, signal, sys, jax, jax.numpy as jnp, numpy as np
        from effv2_jax.training.checkpoint import Checkpoints
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        def state(step):
            rng = np.random.default_rng(step)
            return {"w": jnp.asarray(rng.normal(size=50_000), jnp.float32)}
        with Checkpoints(sys.argv[1], keep_last=1, say=print) as checkpoints:
            checkpoints.save(1, state(1))
            checkpoints.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
            checkpoints.save(2, state(2))
            checkpoints.save(3, {"w": jnp.zeros(3)})
            assert not (checkpoints.folder / "2.orbax-checkpoint-tmp").exists()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            checkpoints.save(4, state(4))
            checkpoints.wait_until_finished()
            print("steps", checkpoints.steps)
            np.testing.assert_array_equal(checkpoints.restore(state(0))["w"], state(4)["w"])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    reports = [line for line in run.stdout.splitlines() if "not written" in line]
    assert len(reports) == 1
    assert "File too large" in reports[0]
    assert "Traceback" not in run.stderr
    assert "newest usable one is of step 1" in reports[0]
    assert "steps [4]" in run.stdout


def test_unfinished_folders_of_a_killed_run_are_cleaned_up(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp/part").write_bytes(b"half")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        save(checkpoints, 2)
        save(checkpoints, 3)
    assert not list(tmp_path.glob("*tmp*"))


def test_half_deleted_old_checkpoint_does_no_harm(tmp_path, said):
    """Killed while an old checkpoint was being deleted."""
    with Checkpoints(tmp_path, keep_last=2, say=said.append) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file():
            path.unlink()
    with Checkpoints(tmp_path, keep_last=2, say=said.append) as checkpoints:
        assert same_bits(checkpoints.restore(make_state(0)), make_state(2))
        save(checkpoints, 3)
        save(checkpoints, 4)
        assert checkpoints.steps == [3, 4]
    assert said == []


def test_damaged_scores_lose_only_the_scores(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, top1=0.5)
    (tmp_path / "scores.json").write_text('{"1": 0.')
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step is None
        assert same_bits(checkpoints.restore(make_state(0)), make_state(1))
        save(checkpoints, 2, top1=0.25)
    assert json.loads((tmp_path / "scores.json").read_text()) == {"2": 0.25}


def test_scores_that_cannot_be_written_do_not_end_the_run(checkpoints, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effv2_jax.training.checkpoint.write_json", full)
    save(checkpoints, 1, top1=0.5)
    assert checkpoints.best_step == 1


def test_reading_while_a_run_writes_changes_nothing(tmp_path, said):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    damage(tmp_path / "2")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.iterdir())
    with Checkpoints(tmp_path, read_only=True, say=said.append) as checkpoints:
        assert same_bits(checkpoints.restore(make_state(0)), make_state(1))
    assert sorted(tmp_path.iterdir()) == before
    assert len(said) == 1
