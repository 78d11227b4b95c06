"""Other people's programs with this project's process settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import json, os, sys
names = ("XLA_FLAGS", "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES")
print(json.dumps({
    "argv": sys.argv[1:],
    "name": __name__,
    "input": sys.stdin.read(),
    "process": os.getpid(),
    "environment": {name: os.environ[name] for name in names if name in os.environ},
}))
sys.exit(7)
"""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def _start(*arguments, folder, **changes):
    ours = ("XLA_", "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "EFFV2_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, "-m", "effv2_jax.tuned", *map(str, arguments)],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **changes},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@linux
@pytest.mark.parametrize("how", [("program.py",), ("-m", "program"), ("-c", PROGRAM)])
def test_a_program_runs_with_the_settings_in_the_same_process(program, how):
    process = _start(*how, "--no-tune", "a b", folder=program.parent)
    out, error = process.communicate("typed", timeout=60)
    seen = json.loads(out)
    assert process.returncode == 7
    assert seen["process"] == process.pid
    assert seen["name"] == "__main__"
    assert seen["argv"] == ["--no-tune", "a b"]
    assert seen["input"] == "typed"
    assert seen["environment"].keys() & {"LD_PRELOAD", "GLIBC_TUNABLES"}
    assert error.startswith("tuning: ")
    assert error.count("\n") == 1


@linux
def test_the_settings_can_be_refused(program):
    process = _start("--no-tune", program, folder=program.parent)
    out, error = process.communicate("", timeout=60)
    assert json.loads(out)["environment"] == {}
    assert error == "tuning: none (refused)\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no program given"),
        (["missing.py"], "missing.py: no such file"),
        (["-m"], "-m: no module given"),
        (["-c"], "-c: no code given"),
        (["--fast", "program.py"], "--fast: no flag of this command"),
    ],
)
def test_what_cannot_be_started_is_refused_in_one_line(program, arguments, told):
    process = _start(*arguments, folder=program.parent)
    out, error = process.communicate("", timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert error.startswith(f"error: {told}")
    assert error.count("\n") == 1
