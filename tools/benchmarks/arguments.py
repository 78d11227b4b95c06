"""Flags that several parts have: what to measure, on what, for how long, and where to write."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import contest
from effv2_jax.command import check_output
from effv2_jax.errors import UserError

DTYPES = ("float32", "bfloat16")


def several(kind: type) -> Callable[[str], list[Any]]:
    """Returns the type of a flag that is a list separated by commas."""

    def read(value: str) -> list[Any]:
        return [kind(part) for part in value.split(",") if part]

    read.__name__ = f"list of {kind.__name__}"  # argparse names it in its message
    return read


def add_list(
    parser: argparse.ArgumentParser, flag: str, default: str, kind: type = str, *, text: str
) -> None:
    """Adds a flag that is a list separated by commas; the help shows the default."""
    read = several(kind)
    shown = f"{text} ({default})" if default else text
    parser.add_argument(flag, default=read(default), type=read, help=shown)


def add_cases(
    parser: argparse.ArgumentParser,
    *,
    models: str = "efficientnetv2-b0",
    sizes: str = "192",
    batches: str = "8",
    cores: str = "all",
) -> None:
    """Adds the flags of what is measured; the arguments are their defaults."""
    add_list(parser, "--model", models, text="names of models")
    add_list(parser, "--image-size", sizes, int, text="pixels")
    add_list(parser, "--batch", batches, int, text="global batch sizes")
    add_list(parser, "--dtype", "float32", text=" or ".join(DTYPES))
    add_list(parser, "--cores", cores, text="of the host: numbers, or all")
    parser.add_argument(
        "--devices",
        type=int,
        default=0,
        help="of the data mesh; 0: all, for a step of inference as many as divide the batch",
    )


def add_measuring(parser: argparse.ArgumentParser, *, rounds: int = 5) -> None:
    """Adds the flags of how long is measured, and where results go."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="of each measurement (%(default)s)")
    add("--seconds", type=float, default=1.0, help="of a round, about (%(default)s)")
    add("--steps", type=int, default=0, help="of a round, exactly; 0: by --seconds")
    add("--json", type=Path, metavar="FILE", help="write all numbers there, as they come")
    add("--resume", action="store_true", help="keep what --json has; measure what is missing")
    add("--cache", action="store_true", help="use the compilation cache of the commands")
    add("--no-tune", action="store_true", help="leave allocator and XLA flags as they are")


def check_choice(flag: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuses values that are not among the allowed ones."""
    for value in values:
        if value not in allowed:
            raise UserError(f"{flag}: {value!r}; expected {', '.join(allowed)}")


def check(flags: argparse.Namespace) -> None:
    """Refuses values of the flags above that nothing could be measured with.

    `flags.cores` become numbers, each once, ascending.
    """
    from effv2_jax.models.variants import get_variant

    check_choice("--dtype", flags.dtype, DTYPES)
    for flag, values in (
        ("--image-size", flags.image_size),
        ("--batch", flags.batch),
        ("--rounds", [flags.rounds]),
    ):
        if min(values, default=0) < 1:
            raise UserError(f"{flag} is {min(values, default='empty')}; expected at least 1")
    for flag, value, meaning in (
        ("--devices", flags.devices, "all"),
        ("--steps", flags.steps, "by time"),
    ):
        if value < 0:
            raise UserError(f"{flag} is {value}; expected 0 ({meaning}) or more")
    if not flags.seconds > 0:
        raise UserError(f"--seconds is {flags.seconds:g}; expected more than 0")
    most = len(contest.usable_cores())
    for value in flags.cores:
        if value != "all" and not (value.isdecimal() and 1 <= int(value) <= most):
            raise UserError(f"--cores: {value!r}; expected 1 to {most} (usable here), or all")
    flags.cores = sorted({most if value == "all" else int(value) for value in flags.cores})
    for name in flags.model:
        get_variant(name)
    check_output("--json", flags.json and str(flags.json), endings=(".json",))
    if flags.resume and flags.json is None:
        raise UserError("--resume: no file to continue; name it with --json")
