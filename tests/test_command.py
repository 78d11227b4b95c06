"""effv2_jax/command.py, and that every command answers a wrong flag the same way."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from effv2_jax import command
from effv2_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def _raise(error: BaseException) -> None:
    raise error


def test_exit_codes(capsys):
    assert command.exit_code(lambda: None) == 0
    assert command.exit_code(_raise, UserError("found a, expected b")) == 2
    assert capsys.readouterr().err == "error: found a, expected b\n"
    assert command.exit_code(_raise, KeyboardInterrupt()) == 130
    with pytest.raises(ValueError, match="a defect"):  # no defect is dressed up as the user's
        command.exit_code(_raise, ValueError("a defect"))


def test_a_reader_that_stops_early_is_no_error():
    code = "from effv2_jax import command\n"
    code += "def run():\n    while True: print('x' * 999)\n"
    code += "raise SystemExit(command.exit_code(run))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    "path",
    [
        *sorted(
            path.stem for path in (ROOT / "tools").glob("*.py") if "\ndef main(" in path.read_text()
        ),
        "effv2_jax.models.summary",
        "effv2_jax.report.confusion",
        "effv2_jax.report.curves",
    ],
)
def test_an_unknown_flag_is_one_line_and_exit_code_2(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module(path)
    first = ["step"] if path == "benchmark" else []
    assert module.main([*first, "--no-such-flag"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_folders_and_files_that_could_not_be_written_are_refused_before_any_work(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    command.check_folder("--to", None)
    command.check_folder("--to", str(tmp_path / "new/and/deep"))
    assert not (tmp_path / "new").exists()
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match=r"--to .*file is no folder"):
            command.check_folder("--to", str(tmp_path / path))
    monkeypatch.setattr(command.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written to; choose another folder"):
        command.check_folder("--to", str(tmp_path / "new"))
    with pytest.raises(UserError, match="cannot be written to; choose another folder"):
        command.check_output("--out", str(tmp_path / "a.csv"))
