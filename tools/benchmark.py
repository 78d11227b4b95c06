"""Measures speed on this machine.

    python tools/benchmark.py step --model efficientnetv2-b0 --image-size 192 --batch 8,16
    python tools/benchmark.py step --lowering plain,cpu        # compared in turns: A B A B ...
    python tools/benchmark.py input                            # reading, decoding, resizing
    python tools/benchmark.py augment                          # every operation on the device
    python tools/benchmark.py COMMAND --help

To measure on one core, bind the process to it: `taskset -c 1 python tools/benchmark.py step`.
"""

import sys
from collections.abc import Callable, Sequence

from effv2_jax import startup
from effv2_jax.command import exit_code
from effv2_jax.errors import UserError


def _step(arguments: Sequence[str]) -> None:
    import benchmark_step  # the folder of this script is on Python's path

    benchmark_step.run(arguments)


def _input(arguments: Sequence[str]) -> None:
    import benchmark_input

    benchmark_input.run(arguments)


def _augment(arguments: Sequence[str]) -> None:
    print(startup.tune(sys.argv), flush=True)  # before JAX is imported
    import benchmark_augment

    benchmark_augment.run(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "step": _step,
    "input": _input,
    "augment": _augment,
}


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    if arguments[0] not in COMMANDS:
        raise UserError(f"unknown command {arguments[0]!r}: expected {', '.join(COMMANDS)}")
    COMMANDS[arguments[0]](arguments[1:])


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
