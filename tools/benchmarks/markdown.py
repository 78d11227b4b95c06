"""Tables for documents: `python tools/benchmark.py tables FILES`.

From the JSON files that other parts wrote, in Markdown, on standard output: steps beside those of
every peer with the ratios, parts of networks alone, rooflines.
"""

import itertools
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.results import OWN, Record, describe_machine, read, settings, steps
from benchmarks.roofline import kernel_times, layer_rows
from effv2_jax.command import Parser
from effv2_jax.errors import UserError

# What tells machines apart; the rest is what they measured at one time.
_MACHINE = ("device", "devices", "processor", "cores", "jax", "jaxlib", "tuning")


def run(arguments: Sequence[str]) -> None:
    """Prints the tables.

    Raises:
        UserError: no results.
    """
    parser = Parser(__doc__, prog="tools/benchmark.py tables")
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON files of results")
    flags = parser.parse_args(arguments)
    contents = [read(file) for file in flags.files]
    found = [record for content in contents for record in content["results"]]
    sections = [
        *_steps(steps(found)),
        *_blocks([record for record in found if record["kind"] == "block"]),
        *_rooflines([record for record in found if record["kind"] == "roofline"]),
    ]
    if not sections:
        raise UserError(f"{', '.join(flags.files)}: no results of step, block or roofline")
    machines = [machine for content in contents for machine in content["machines"]]
    told = [describe_machine(*same) for _, same in _groups(machines, *_MACHINE)]
    print("\n\n".join([*told, *sections]))


def _steps(found: Sequence[Record]) -> Iterable[str]:
    """A table per model and type; a line per case, a column per contestant."""
    for (model, dtype), group in _groups(found, "model", "dtype"):
        names = list(dict.fromkeys(_label(record) for record in group))
        others = [name for name in names if name != names[0]]
        head = ["px", "batch", "cores", "step", *(f"{name}, images/s" for name in names)]
        head += [f"/ {name}" for name in others]
        rows = []
        keys = ("image_size", "batch", "cores", "mode", "recipe", "stage")
        cases = sorted(
            _groups(group, *keys), key=lambda case: (*case[0][:3], case[0][3] != "train")
        )
        for values, case in cases:
            by_name = {_label(record): record for record in case}
            size, batch, cores, mode, recipe, stage = values
            step = mode if recipe == "plain" else f"{mode}, {recipe}"
            step = step if stage is None else f"{step} stage {stage + 1}"
            rates = [_rate(by_name.get(name)) for name in names]
            pairs = [_ratio(by_name.get(name)) for name in others]
            rows.append([str(size), str(batch), str(cores), step, *rates, *pairs])
        told = dict.fromkeys(map(settings, group))
        lines = [f"**{model}, {dtype}**", _table(head, rows), *_summary(group)]
        yield "\n\n".join([*lines, "\n".join(f"* {line}" for line in told)])
    if len({record["model"] for record in found}) > 1:
        together = _summary(found)
        yield from ("All networks together. " + line for line in together)
        yield from [_kinds(found)] if together else []


def _summary(found: Sequence[Record]) -> list[str]:
    """How this project stands to the fastest peer of every case."""
    best = _least_ratios(found)
    if not best:
        return []
    return [f"Against the fastest peer of each of {len(best)} cases: median {_spread(best)}."]


def _kinds(found: Sequence[Record]) -> str:
    """The same by network, number of cores and step; the number of cases in brackets."""
    kinds = [kind for kind, _ in _groups(found, "cores", "mode")]
    kinds.sort(key=lambda kind: (kind[0], kind[1] != "train"))
    rows = []
    for values, group in _groups(found, "model", "dtype"):
        best = {kind: _least_ratios(same) for kind, same in _groups(group, "cores", "mode")}
        cells = [best.get(kind) for kind in kinds]
        rows.append([*values, *(f"{_spread(c)} [{len(c)}]" if c else "" for c in cells)])
    head = [f"{cores} core{'s' * (cores > 1)}, {mode}" for cores, mode in kinds]
    return _table(["network", "type", *head], rows)


def _least_ratios(found: Sequence[Record]) -> list[float]:
    """Of every case, the ratio to the peer that is the fastest there."""
    best = []
    keys = ("model", "dtype", "image_size", "batch", "cores", "mode", "recipe", "stage")
    for _, case in _groups([record for record in found if "ratio" in record], *keys):
        peers = [record["ratio"][0] for record in case if record["framework"] != OWN]
        best += [min(peers)] if peers else []
    return best


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def _blocks(found: Sequence[Record]) -> Iterable[str]:
    for values, group in _groups(found, "model", "image_size", "batch", "dtype", "cores"):
        head = ["part", "blocks", "input", "inference ms", "of bound", "forward ms"]
        head += ["backward ms", "training ms", "of bound"]
        rows = []
        for _, part in itertools.groupby(group, lambda record: (record["part"], record["block"])):
            by_pass = {record["pass"]: record for record in part}
            infer, forward, train = (by_pass[key] for key in ("infer", "forward", "train"))
            rows.append([
                infer["part"], str(infer["count"]), " x ".join(map(str, infer["input"])),
                f"{infer['ms']:.2f}", f"{infer['bound_ms'] / infer['ms']:.0%}",
                f"{forward['ms']:.2f}", f"{train['ms'] - forward['ms']:.2f}",
                f"{train['ms']:.2f}", f"{train['bound_ms'] / train['ms']:.0%}",
            ])  # fmt: skip
        yield f"{_title(values)}\n\n{_table(head, rows)}"


def _rooflines(found: Sequence[Record]) -> Iterable[str]:
    for record in found:
        keys = ("model", "image_size", "batch", "dtype", "cores")
        title = _title([record[key] for key in keys])
        head = ["layers", "GFLOP", "least MB", "bound ms", "by matmul", "kernels ms", "of bound"]
        spent = kernel_times(record, "part", "pass")
        parts = kernel_times(record, "part")
        rows = [
            [part, f"{spent[part, 'forward']:.1f}", f"{spent[part, 'backward']:.1f}",
             f"{parts[part] / record['step_ms']:.0%}"]
            for part in sorted(parts, key=parts.get, reverse=True)
        ]  # fmt: skip
        yield (
            f"{title} {record['mode']}: {record['step_ms']:,.1f} ms\n\n"
            f"{_table(head, layer_rows(record))}\n\n"
            f"{_table(['spent on', 'forward ms', 'backward ms', 'share'], rows)}"
        )


def _title(values: Sequence) -> str:
    model, size, batch, dtype, cores = values
    return f"**{model}, {size} px, batch {batch}, {dtype}, {cores} core{'s' * (cores > 1)}**"


def _label(record: Record) -> str:
    lowering = record["lowering"]
    plain = lowering in (None, "auto")
    return record["framework"] if plain else f"{record['framework']} {lowering}"


def _rate(record: Record | None) -> str:
    if record is None:
        return ""
    low, high = record["range"]
    return f"{record['images_per_second']:,.1f} ({low:,.1f} - {high:,.1f})"


def _ratio(record: Record | None) -> str:
    if record is None or "ratio" not in record:
        return ""
    median, low, high = record["ratio"]
    apart = "" if record["in_turns"] else ", not in turns"
    return f"{median:.2f} ({low:.2f} - {high:.2f}{apart})"


def _groups(found: Sequence[Record], *keys: str) -> Iterable[tuple[tuple, list[Record]]]:
    """Records with the same values of the keys, in the order of their first."""
    groups: dict[tuple, list[Record]] = {}
    for record in found:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups.items()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers to the right."""
    rows = list(rows)
    numeric = [all(not row[i] or row[i][0].isdigit() for row in rows) for i in range(len(head))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
