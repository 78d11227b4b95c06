"""Measures how near a step comes to the machine's limit: `python tools/benchmark.py roofline -h`.

Of every kind of layer: operations and least bytes (tools/benchmarks/counts.py), the least time that
the machine's measured matrix and copy rates allow, and the time its kernels took, by a profile of a
few steps; then on what the step is spent.
"""

import argparse
import collections
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import arguments as shared
from benchmarks import contest, counts, forms, own
from benchmarks.results import Case, Record, Results, describe_machine
from effv2_jax.command import Parser, say

_MODES = ("train", "infer")
_QUIET = 1.1  # rates of a quiet machine differ by less
_KINDS = ("stem", "dense", "pointwise", "depthwise", "head", "classifier")

_EPILOG = """\
Layers include what rides along: their norm, activation, squeeze-excite, shortcut, pooling. The
bound is the larger of operations / matrix rate and bytes / copy rate, layer by layer; "by matmul"
says how much of it is arithmetic. The rates are measured before and after, the higher ones count.
A kernel with several convolutions or products in it counts for the first, another one that does
several things for the last of them; "-": computed in the kernels of other layers.
"""


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong.
    """
    parser = Parser(__doc__.splitlines()[0], _EPILOG, prog="tools/benchmark.py roofline")
    shared.add_cases(parser)
    shared.add_list(parser, "--mode", "train,infer", text="which steps")
    shared.add_list(parser, "--lowering", "auto", text="auto, plain, cpu, gpu")
    shared.add_measuring(parser)
    flags = parser.parse_args(arguments)
    shared.check_choice("--mode", flags.mode, _MODES)
    shared.check_choice("--lowering", flags.lowering, forms.LOWERINGS)
    shared.check(flags)
    measure(flags, Results(flags.json, None, resume=flags.resume))


def measure(flags: argparse.Namespace, results: Results) -> None:
    """Measures all cases of the flags."""
    machines: dict[int, Any] = {}
    for count, dtype, name, size, batch, mode, lowering in itertools.product(
        flags.cores, flags.dtype, flags.model, flags.image_size, flags.batch, flags.mode,
        flags.lowering,
    ):  # fmt: skip
        case = Case(model=name, image_size=size, batch=batch, dtype=dtype, cores=count, mode=mode)
        contestant = own.contestant(case, flags, lowering=lowering)
        if results.has(case, [contestant], kind="roofline"):
            continue
        cores = own.cores_of(count)
        if count not in machines:
            machines[count] = own.measure_machine(flags, cores)
            results.machines.append(machines[count])
            print(f"{describe_machine(machines[count])}\n", flush=True)
        say(str(case))
        record = _measure(case, contestant, flags, cores, machines[count])
        results.add([record])
        print(f"{table(record)}\n", flush=True)


def _measure(
    case: Case,
    contestant: contest.Contestant,
    flags: argparse.Namespace,
    cores: Sequence[int],
    machine: dict[str, Any],
) -> Record:
    environment = contest.environment_of(contestant, {})
    with contest.Worker(contestant, cores=cores, environment=environment) as worker:
        facts = worker.ask("prepare", **contestant.task)
        first = min(worker.ask("run", steps=1)["wall"] for _ in range(2))
        steps = flags.steps or max(1, min(1000, round(flags.seconds / first)))
        walls = [worker.ask("run", steps=steps)["wall"] for _ in range(flags.rounds)]
        profile = worker.ask("profile", steps=max(2, min(steps, 10)))
    rates = _higher(machine, own.measure_machine(flags, cores), case.dtype)
    return {
        "kind": "roofline",
        **{key: getattr(case, key) for key in case.__dataclass_fields__},
        "framework": contestant.name,
        "asked": dict(contestant.asked),
        "step_ms": 1e3 * statistics.median(walls),
        "range_ms": [1e3 * min(walls), 1e3 * max(walls)],
        "matmul_flops": rates.matmul_flops,
        "copy_bytes": rates.copy_bytes,
        "layers": layer_bounds(case, rates),
        **profile,
        **facts,
        "time": contest.utc(),
    }


def _higher(before: dict[str, Any], after: dict[str, Any], dtype: str) -> counts.Rates:
    """What the machine reaches: other work on it can only make it look slower."""
    matmul = [machine["matmul_flops"][dtype] for machine in (before, after)]
    copies = [machine["copy_bytes"] for machine in (before, after)]
    if max(max(matmul) / min(matmul), max(copies) / min(copies)) > _QUIET:
        say(
            f"the machine is not quiet: matrix products {matmul[0] / 1e9:,.0f}, then "
            f"{matmul[1] / 1e9:,.0f} GFLOP/s, copies {copies[0] / 1e9:,.1f}, then "
            f"{copies[1] / 1e9:,.1f} GB/s; read the shares with care"
        )
    return counts.Rates(max(matmul), max(copies))


def layer_bounds(case: Case, rates: counts.Rates) -> dict[str, dict[str, float]]:
    """Returns of each kind of layer what a batch needs, and the least time it takes."""
    from effv2_jax.models.variants import get_variant

    found: dict[str, dict[str, float]] = {}
    for layer in counts.count_layers(get_variant(case.model), image_size=case.image_size):
        options = {"dtype": case.dtype, "batch": case.batch}
        bound = rates.bound(layer, case.mode, **options)
        row = found.setdefault(
            layer.kind, {"operations": 0, "bytes": 0, "bound_ms": 0, "arithmetic_ms": 0}
        )
        milliseconds = 1e3 * case.batch * bound.seconds
        row["operations"] += case.batch * layer.operations(case.mode)
        row["bytes"] += case.batch * layer.bytes(case.mode, **options)
        row["bound_ms"] += milliseconds
        row["arithmetic_ms"] += milliseconds * (bound.by == "matmul")
    return found


def kernel_times(record: Record, *keys: str) -> dict[Any, float]:
    """Adds up the kernels of a record by "layer", "part" and "pass", in ms of an undisturbed step.

    Profiling slows the step down; the times are scaled to what it takes without.
    """
    scale = record["step_ms"] / record["wall_ms"]
    positions = [("layer", "part", "pass").index(key) for key in keys]
    sums: dict[Any, float] = collections.defaultdict(float)
    for kernel in record["kernels"]:
        chosen = tuple(kernel[position] for position in positions)
        sums[chosen if len(chosen) > 1 else chosen[0]] += scale * kernel[3]
    return sums


def table(record: Record) -> str:
    """A record for a reader."""
    lines = [
        f"{record['model']}, {record['image_size']} px, batch {record['batch']}, "
        f"{record['dtype']}, {record['cores']} core{'s' * (record['cores'] > 1)}, "
        f"{record['mode']}: {record['step_ms']:,.1f} ms",
        f"{'layers':<22}{'GFLOP':>9}{'least MB':>10}{'bound ms':>10}{'by matmul':>11}"
        f"{'kernels ms':>12}{'of bound':>10}",
    ]
    for name, work, least, bound, arithmetic, kernels, reached in layer_rows(record):
        lines.append(
            f"{name:<22}{work:>9}{least:>10}{bound:>10}{arithmetic:>11}{kernels:>12}{reached:>10}"
        )
    spent = kernel_times(record, "part", "pass")
    lines += ["", f"{'spent on':<22}{'forward':>9}{'backward':>10}{'share':>10}"]
    parts = kernel_times(record, "part")
    for part in sorted(parts, key=parts.get, reverse=True):
        forward, backward = spent[part, "forward"], spent[part, "backward"]
        share = parts[part] / record["step_ms"]
        lines.append(f"{part:<22}{forward:>9.1f}{backward or 0:>10.1f}{share:>10.0%}")
    between = record["step_ms"] - sum(parts.values())
    lines.append(
        f"{'no kernel':<22}{between:>9.1f}{'':>10}{between / record['step_ms']:>10.0%}"
        if between >= 0
        else f"kernels overlap: together {-between:.1f} ms more than the step"
    )
    return "\n".join(lines)


def has_kernels(row: dict[str, float], milliseconds: float) -> bool:
    """Whether a kind of layers has kernels of its own, not parts of others' alone."""
    return milliseconds > row["bound_ms"] / 10


def layer_rows(record: Record) -> list[list[str]]:
    """The kinds of layers, then all of them, as the cells of a table."""
    times = kernel_times(record, "layer")
    rows = [(kind, record["layers"][kind], times[kind]) for kind in _KINDS
            if kind in record["layers"]]  # fmt: skip
    keys = ("operations", "bytes", "bound_ms", "arithmetic_ms")
    total = {key: sum(row[key] for _, row, _ in rows) for key in keys}
    return [
        [
            name,
            f"{row['operations'] / 1e9:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bound_ms']:.1f}",
            f"{row['arithmetic_ms'] / row['bound_ms']:.0%}",
            f"{milliseconds:.1f}",
            f"{row['bound_ms'] / milliseconds:.0%}" if has_kernels(row, milliseconds) else "-",
        ]
        for name, row, milliseconds in [*rows, ("the step", total, record["step_ms"])]
    ]
