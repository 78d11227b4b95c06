"""The command: what it reads, what it refuses, and how it exits."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from effv2_jax import main as command
from effv2_jax.errors import UserError

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.py")


@pytest.fixture
def calls(monkeypatch):
    """Replaces tuning and the loop; returns what they were called with."""
    made = []
    loop = types.ModuleType("effv2_jax.training.loop")
    loop.train = lambda config, workdir: made.append(("train", config, workdir))
    loop.evaluate = lambda config, workdir: made.append(("evaluate", config, workdir))
    monkeypatch.setitem(sys.modules, "effv2_jax.training.loop", loop)
    training = sys.modules.get("effv2_jax.training") or __import__("effv2_jax.training").training
    monkeypatch.setattr(training, "loop", loop, raising=False)

    def tune(argv, *, enabled=True):
        made.append(("tune", argv, enabled))
        return "tuned"

    monkeypatch.setattr(command.startup, "tune", tune)
    return made


def _main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["effv2_jax.main", *arguments])
    return command.main()


def test_flags_reach_the_loop(calls, monkeypatch, tmp_path):
    arguments = ("--config", DIGITS, "--workdir", str(tmp_path), "--config.train.epochs=5")
    arguments += ("--config.progressive.image_sizes=16,24,32", "--config.train.seed", "7")
    assert _main(monkeypatch, *arguments) == 0
    (_, _, tuned), (what, config, workdir) = calls
    assert tuned
    assert (what, workdir) == ("train", tmp_path)
    assert (config.train.epochs, config.train.seed) == (5.0, 7)
    assert config.progressive.image_sizes == (16, 24, 32)
    assert config.data.source == "digits"


def test_mode_eval_evaluates_and_no_tune_is_passed_on(calls, monkeypatch, tmp_path):
    arguments = (f"--config={DIGITS}", "--workdir", str(tmp_path), "--mode", "eval", "--no-tune")
    assert _main(monkeypatch, *arguments) == 0
    assert [call[0] for call in calls] == ["tune", "evaluate"]
    assert calls[0][2] is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--config, --workdir"),
        (("--config", DIGITS), "required: --workdir"),
        (("--workdir", "w"), "required: --config"),
        (("--config", DIGITS, "--workdir", ""), "--workdir is empty"),
        (("--config", "configs/none.py", "--workdir", "w"), "no config file 'configs/none.py'"),
        (("--config", f"{DIGITS}:b0", "--workdir", "w"), "takes no argument; found 'b0'"),
        (("--config", DIGITS, "--workdir", "w", "--mode", "test"), "invalid choice: 'test'"),
        (("--config", DIGITS, "--workdir", "w", "--workdirs"), "unknown flag --workdirs"),
        (("--config", DIGITS, "--workdir", "w", "--tune"), "nearest: --no-tune"),
        (("--config", DIGITS, "--workdir", "w", "--work", "x"), "unknown flag --work"),
        (("--config", DIGITS, "--workdir", "w", "digits"), "unknown flag digits"),
        (("--config", DIGITS, "--workdir", "w", "--config.train.epoch=5"), "nearest: train.epochs"),
        (("--config", DIGITS, "--workdir", "w", "--config.train.seed"), "needs a value"),
        (
            ("--config", DIGITS, "--workdir", "w", "--config.train.seed", "--no-tune"),
            "--config.train.seed needs a value",
        ),
        (
            ("--config", DIGITS, "--workdir", "w", "--config.train.batch_size=many"),
            "--config.train.batch_size=many: expected a whole number",
        ),
        (
            ("--config", DIGITS, "--workdir", "w", "--config.model.name=efficientnet-b9"),
            "no such model (nearest: efficientnet-b",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(calls, monkeypatch, capsys, arguments, says):
    assert _main(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert calls == []


def test_what_the_loop_refuses_exits_with_2_too(calls, monkeypatch, capsys, tmp_path):
    def refuse(config, workdir):
        raise UserError(f"{workdir} is in use")

    monkeypatch.setattr(sys.modules["effv2_jax.training.loop"], "train", refuse)
    assert _main(monkeypatch, "--config", DIGITS, "--workdir", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is in use\n"


def test_ctrl_c_exits_as_shells_expect(calls, monkeypatch, tmp_path):
    def interrupt(config, workdir):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["effv2_jax.training.loop"], "train", interrupt)
    arguments = ("--config", DIGITS, "--workdir", str(tmp_path))
    assert _main(monkeypatch, *arguments) == 128 + signal.SIGINT


def test_exit_code_of_a_run_that_a_signal_ended_is_kept(calls, monkeypatch, tmp_path):
    def stopped(config, workdir):
        raise SystemExit(128 + signal.SIGTERM)

    monkeypatch.setattr(sys.modules["effv2_jax.training.loop"], "train", stopped)
    with pytest.raises(SystemExit) as exit_:
        _main(monkeypatch, "--config", DIGITS, "--workdir", str(tmp_path))
    assert exit_.value.code == 143


def test_anything_else_keeps_its_traceback(calls, monkeypatch, tmp_path):
    def fail(config, workdir):
        raise RuntimeError("a defect")

    monkeypatch.setattr(sys.modules["effv2_jax.training.loop"], "train", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        _main(monkeypatch, "--config", DIGITS, "--workdir", str(tmp_path))


def _python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )


def test_command_line_refuses_without_traceback():
    done = _python("-m", "effv2_jax.main", "--config", "configs/digit.py", "--workdir", "w")
    assert done.returncode == 2
    assert done.stderr == "error: no config file 'configs/digit.py' (nearest: configs/digits.py)\n"
    assert not (ROOT / "w").exists()


def test_help_names_the_flags_and_where_the_keys_are():
    done = _python("-m", "effv2_jax.main", "--help")
    assert done.returncode == 0
    for text in ("--config", "--workdir", "--mode", "--no-tune", "--config.train.epochs=5"):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_wrong_input_is_found_before_jax_is_imported():
    code = (
        "import sys; from effv2_jax import main; sys.argv = ['main', '--config', "
        "'configs/digits.py', '--workdir', 'w', '--config.train.batch_size=0']; code = main.main();"
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    done = _python("-c", code)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: config: train.batch_size = 0: expected at least 1\n"


def test_a_real_run_stopped_by_a_signal_exits_143_and_continues(tmp_path):
    arguments = ["-m", "effv2_jax.main", "--config", "configs/digits.py", "--workdir"]
    arguments += [str(tmp_path / "run"), "--config.train.epochs=9", "--config.eval.every_epochs=9"]
    arguments += ["--config.progressive.image_sizes=16", "--config.progressive.dropout_rates=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("first step done"):
                process.send_signal(signal.SIGTERM)
    log = "".join(lines)
    assert process.returncode == 128 + signal.SIGTERM, log
    assert lines[0].startswith("tuning: "), log
    assert not (tmp_path / "run" / "final.safetensors").exists()

    done = _python(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("config.json", "plan.json", "metrics.jsonl", "final.safetensors", "curves.png"):
        assert (tmp_path / "run" / name).is_file(), name
