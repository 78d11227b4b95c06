"""Runs another program with this project's process settings: `python -m effv2_jax.tuned PROGRAM`.

Importing the library changes no setting, so a program that trains or predicts with it on a CPU
computes with the system's allocator, XLA's own vector width and one device. An allocator can only
be chosen before a program starts (`startup.py`).
"""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from effv2_jax import startup
from effv2_jax.command import Parser, exit_code, say
from effv2_jax.errors import UserError

_FLAGS = ("--no-tune", "-h", "--help")

_EPILOG = """\
PROGRAM is what stands behind `python`: a file, -m MODULE or -c CODE, and its arguments. It takes
the place of this process, so signals reach it and its exit code is returned.

examples:
  python -m effv2_jax.tuned my_training.py --epochs 5
  python -m effv2_jax.tuned -m jupyter lab
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code: the program's own, once it has started."""
    return exit_code(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    flags = list(itertools.takewhile(_FLAGS.__contains__, arguments))
    program = list(arguments[len(flags) :])
    parser = Parser(
        "Runs a program with the process settings of this project's commands.",
        _EPILOG,
        prog="python -m effv2_jax.tuned",
    )
    parser.usage = "%(prog)s [--no-tune] PROGRAM [ARGUMENT ...]"
    parser.add_argument("--no-tune", action="store_true", help="run it with no settings")
    tuned = not parser.parse_args(flags).no_tune
    _check(program)
    say(startup.tune(sys.argv, enabled=tuned))
    os.execv(sys.executable, [sys.executable, *program])


def _check(program: Sequence[str]) -> None:
    """Refuses what Python could not start, before anything is started."""
    if not program:
        raise UserError("no program given; name a file, or -m MODULE, as behind `python`")
    if program[0] in ("-m", "-c"):
        if len(program) < 2:
            raise UserError(f"{program[0]}: no {'module' if program[0] == '-m' else 'code'} given")
    elif program[0].startswith("-"):
        known = ", ".join(_FLAGS)
        raise UserError(f"{program[0]}: no flag of this command ({known}), and no program")
    elif not Path(program[0]).exists():
        raise UserError(f"{program[0]}: no such file; expected a Python program, or -m MODULE")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
