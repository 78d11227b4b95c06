"""Prints how far the networks are from the official ones, as a Markdown table.

    python tools/parity_table.py [NAME ...] [--lowering auto|plain|cpu]

Run from the root of the repository: the numbers of the official code are in tests/reference_data.
Deviations are relative: logits to the standard deviation of the official logits (root mean square
of the difference), endpoints as in tests/reference.py, the largest of all. L2 takes 8 GB of memory.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from effv2_jax.command import Parser, exit_code
from effv2_jax.models.lowering import IMPLEMENTATIONS
from effv2_jax.models.network import create_model
from effv2_jax.models.variants import list_models
from tests import reference


def deviations(name: str, *, lowering: str) -> dict[str, tuple[float, float]]:
    """Returns (logits, worst endpoint) of every stored case of a network."""
    model = create_model(name, lowering=lowering)
    apply = jax.jit(functools.partial(model.apply, endpoints=True))
    variables = reference.model_variables(name)
    stored, out = reference.model_logits(name), {}
    for case in ("square", "rect", "full"):
        if f"{case}_logits" in stored:
            logits, ends = apply(variables, reference.model_input(name, case))
            ends = {key: np.asarray(value) for key, value in ends.items()}
            out[case] = (
                reference.logits_deviation(logits, stored[f"{case}_logits"]),
                max(reference.endpoint_deviations(name, case, ends).values()),
            )
    return out


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list_models())
    parser.add_argument("--lowering", choices=IMPLEMENTATIONS, default="auto")
    flags = parser.parse_args(arguments)
    print("| model | parameters | square 128x128 | rect 94x133 | full | worst endpoint | s |")
    print("|---|---|---|---|---|---|---|")
    for name in flags.names:
        start = time.monotonic()
        found = deviations(name, lowering=flags.lowering)
        cells = [f"{found[case][0]:.1e}" if case in found else "" for case in
                 ("square", "rect", "full")]  # fmt: skip
        worst = max(end for _, end in found.values())
        parameters = reference.model_facts(name)["params_trainable"]
        seconds = time.monotonic() - start
        print(
            f"| {name} | {parameters:,} | {' | '.join(cells)} | {worst:.1e} | {seconds:.0f} |",
            flush=True,
        )
        jax.clear_caches()


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
