"""Draws what was measured: `python tools/benchmark.py draw FILES --out DIR`.

From the JSON files that other parts wrote: images per second against image size and against batch
size, the time of every block, and the roofline with what a step is spent on. A picture is drawn for
every model (and size, batch, ...) that the files have numbers of.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import pictures
from benchmarks.results import Record, read
from effv2_jax.command import Parser, say, written
from effv2_jax.errors import UserError

_MODES = ("train", "infer")


def run(arguments: Sequence[str]) -> None:
    """Draws.

    Raises:
        UserError: no results, or nothing to draw in them.
    """
    parser = Parser(__doc__, prog="tools/benchmark.py draw")
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON files of results")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the pictures")
    flags = parser.parse_args(arguments)
    found = [record for file in flags.files for record in read(file)["results"]]
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {flags.out}: no folder can be made: {error.strerror}") from None
    drawn = 0
    for name, figure in _pictures(found):
        with written(flags.out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        say(f"{flags.out / name}.png")
        drawn += 1
    if not drawn:
        raise UserError(
            f"{', '.join(flags.files)}: nothing to draw; expected results of step at several image "
            "or batch sizes, of block or of roofline"
        )


def _pictures(found: Sequence[Record]) -> Iterable[tuple[str, pictures.Figure]]:
    """Yields names and figures."""
    steps = _of(found, "step", lambda r: r["stage"] is None)
    for (model, dtype), records in _groups(steps, "model", "dtype"):
        for key, other in (("image_size", "batch"), ("batch", "image_size")):
            fixed = _middle(records, other, varied=key)
            if fixed is not None:
                chosen = [record for record in records if record[other] == fixed]
                name = f"{'size' if key == 'image_size' else 'batch'}_{model}_{dtype}"
                yield name, pictures.speed(chosen, key)
    keys = ("model", "image_size", "batch", "dtype", "cores")
    for values, records in _groups(_of(found, "block"), *keys):
        yield _name("blocks", values), pictures.blocks(records)
    for values, records in _groups(_of(found, "roofline"), *keys):
        ordered = sorted(records, key=lambda record: _MODES.index(record["mode"]))
        yield _name("roofline", values), pictures.roofline(ordered)


def _name(picture: str, values: Sequence) -> str:
    model, size, batch, dtype, cores = values
    return f"{picture}_{model}_{size}px_batch{batch}_{dtype}_{cores}core"


def _of(
    found: Sequence[Record], kind: str, wanted: Callable[[Record], bool] = lambda record: True
) -> list[Record]:
    return [record for record in found if record["kind"] == kind and wanted(record)]


def _groups(found: Sequence[Record], *keys: str) -> Iterable[tuple[tuple, list[Record]]]:
    def key(record: Record) -> tuple:
        return tuple(record[name] for name in keys)

    for values, group in itertools.groupby(sorted(found, key=key), key):
        yield values, list(group)


def _middle(found: Sequence[Record], fixed: str, *, varied: str) -> int | None:
    """The value of `fixed` to draw at: of those measured at most values of `varied`, the middle."""
    reach = {value: {r[varied] for r in found if r[fixed] == value} for value in _all(found, fixed)}
    most = max(len(values) for values in reach.values())
    if most < 2:
        return None
    best = [value for value in sorted(reach) if len(reach[value]) == most]
    return best[len(best) // 2]


def _all(found: Sequence[Record], key: str) -> set:
    return {record[key] for record in found}
