"""Measures speed on this machine.

    python tools/benchmark.py step --model efficientnetv2-b0 --image-size 192 --batch 8,16
    python tools/benchmark.py step --lowering plain,cpu        # compared in turns: A B A B ...
    python tools/benchmark.py step --peer timm,keras-tf        # the same in other frameworks
    python tools/benchmark.py grid --json grid.json            # all of it, against peers; hours
    python tools/benchmark.py block --model efficientnetv2-s   # stem, blocks and head alone
    python tools/benchmark.py roofline                         # how near to the machine's limit
    python tools/benchmark.py input                            # reading, decoding, resizing
    python tools/benchmark.py loader --peer tf-data,timm       # the whole pipeline, in turns
    python tools/benchmark.py end-to-end                       # a real run beside its step
    python tools/benchmark.py convolutions                     # every shape, every pass
    python tools/benchmark.py memory --image-size 128,300      # the largest batches
    python tools/benchmark.py gpu --out gpu --minutes 30       # what matters on a GPU
    python tools/benchmark.py augment                          # every operation on the device
    python tools/benchmark.py compile-only h200                # counts what a step costs there
    python tools/benchmark.py draw FILES --out pictures        # of what was measured
    python tools/benchmark.py tables FILES                     # the same in Markdown
    python tools/benchmark.py PART --help

`--cores 1` measures on one core; `input` and `augment` are bound to it: `taskset -c 1 python ...`.
"""

import importlib
import sys
from collections.abc import Sequence

from effv2_jax import startup
from effv2_jax.command import exit_code
from effv2_jax.errors import UserError

# Part -> its module, beside this file; each has `run(arguments)`.
PARTS = {
    "step": "benchmarks.step",
    "grid": "benchmarks.grid",
    "block": "benchmarks.block",
    "roofline": "benchmarks.roofline",
    "convolutions": "benchmarks.convolutions",
    "memory": "benchmarks.memory",
    "gpu": "benchmarks.gpu",
    "end-to-end": "benchmarks.end_to_end",
    "draw": "benchmarks.draw",
    "tables": "benchmarks.markdown",
    "input": "benchmarks.input",
    "loader": "benchmarks.loader",
    "augment": "benchmarks.augment",
    "compile-only": "benchmarks.compile_only",
}

# Parts that compute in this process, with the process settings of the commands.
TUNED = ("augment",)


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    if arguments[0] not in PARTS:
        raise UserError(f"unknown part {arguments[0]!r}: expected {', '.join(PARTS)}")
    if arguments[0] in TUNED:
        print(startup.tune(sys.argv), flush=True)  # before the module imports JAX
    importlib.import_module(PARTS[arguments[0]]).run(arguments[1:])


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
