"""Measures the parts of a network alone: `python tools/benchmark.py block --help`.

The stem, one block of each kind in every stage, and the head, each as the network has it, split
over the data mesh: what they take, and what the machine's matrix and copy rates would allow for the
operations and least bytes they need (tools/benchmarks/counts.py).
"""

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import arguments as shared
from benchmarks import contest, counts, forms, own
from benchmarks.results import Record, Results, describe_machine
from effv2_jax.command import Parser, say

_PASSES = ("infer", "forward", "train")

_EPILOG = """\
"forward" is the training step's forward pass, "backward" what the gradients of weights and input
and the update of the weights take beyond it. Below the parts: each times the number of its blocks.
"of bound": the share that was reached of what the machine's rates allow.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Equal blocks of a network, or its stem or head.

    Attributes:
        name: for readers.
        part: stem, block or head.
        block: number of the first of them.
        count: how many.
        input: shape of an example, (height, width, channels).
        layers: of one of them.
    """

    name: str
    part: str
    block: int | None
    count: int
    input: tuple[int, int, int]
    layers: tuple[counts.Layer, ...]


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong, or a part that cannot be computed.
    """
    parser = Parser(__doc__.splitlines()[0], _EPILOG, prog="tools/benchmark.py block")
    shared.add_cases(parser)
    shared.add_list(parser, "--lowering", "auto", text="auto, plain, cpu, gpu")
    shared.add_measuring(parser)
    parser.set_defaults(seconds=0.2)
    flags = parser.parse_args(arguments)
    shared.check_choice("--lowering", flags.lowering, forms.LOWERINGS)
    shared.check(flags)
    measure(flags, Results(flags.json, None, resume=flags.resume))


def measure(flags: argparse.Namespace, results: Results) -> None:
    """Measures all networks, sizes and batches of the flags."""
    for count in flags.cores:
        cores = own.cores_of(count)
        machine = own.measure_machine(flags, cores)
        results.machines.append(machine)
        print(f"{describe_machine(machine)}\n", flush=True)
        for name, size, batch, dtype, lowering in itertools.product(
            flags.model, flags.image_size, flags.batch, flags.dtype, flags.lowering
        ):
            asked = {"lowering": lowering, "devices": flags.devices, "tuned": not flags.no_tune}
            case = {
                "kind": "block", "framework": "effv2_jax", "asked": asked, "model": name,
                "image_size": size, "batch": batch, "dtype": dtype, "cores": count,
            }  # fmt: skip
            if any(
                all(record.get(key) == value for key, value in case.items())
                for record in results.records
            ):
                continue
            title = f"{name}, {size} px, batch {batch}, {dtype}, {lowering} lowering"
            print(f"{title}, {count} core{'s' * (count > 1)}")
            found = list(_measure_parts(case, flags, cores, machine))
            print(f"{table(found)}\n", flush=True)
            results.add(found)


def parts_of(model: str, image_size: int) -> list[Part]:
    """Returns the parts of a network in order, equal neighbours together."""
    from effv2_jax.models.summary import summarize
    from effv2_jax.models.variants import get_variant

    variant = get_variant(model)
    operators = {row.stage: row.operator for row in summarize(variant, image_size=image_size)}
    layers = counts.count_layers(variant, image_size=image_size)
    found: list[Part] = []
    side, channels = image_size, 3
    for (stage, block), group in itertools.groupby(layers, lambda x: (x.stage, x.block)):
        if stage == "classifier":
            continue
        own_layers = tuple(group)
        shape = (side, side, channels)
        side, channels = own_layers[-1].side, own_layers[-1].features
        one = Part(
            name=f"{stage}: {operators[stage]}",
            part=stage if block is None else "block",
            block=block,
            count=1,
            input=shape,
            layers=own_layers,
        )
        last = found[-1] if found else None
        if last and _alike(last, one):
            found[-1] = dataclasses.replace(last, count=last.count + 1)
        elif last and last.name == one.name:
            found.append(dataclasses.replace(one, name=f"{stage}: its others"))
        else:
            found.append(one)
    return found


def _alike(one: Part, other: Part) -> bool:
    def costs(part: Part) -> tuple:
        return (part.input, *(dataclasses.replace(x, block=None) for x in part.layers))

    return costs(one) == costs(other)


def _measure_parts(
    case: dict[str, Any], flags: argparse.Namespace, cores: Sequence[int], machine: dict[str, Any]
) -> Iterator[Record]:
    """Measures every part in one process after the other pass; yields records."""
    contestant = contest.Contestant(
        name="effv2_jax", command=own.command("block_worker.py", flags), task={}
    )
    environment = contest.environment_of(contestant, {})
    with contest.Worker(contestant, cores=cores, environment=environment) as worker:
        for part in parts_of(case["model"], case["image_size"]):
            say(f"  {part.name}, {' x '.join(map(str, part.input))}")
            for kind in _PASSES:
                task = {**case, **case["asked"], "part": part.part, "block": part.block}
                task |= {"input": part.input, "pass": kind, "cache": flags.cache}
                prepared = worker.ask("prepare", **task)
                first = worker.ask("run", steps=1)["wall"]
                steps = flags.steps or max(1, min(10_000, round(flags.seconds / first)))
                walls = [worker.ask("run", steps=steps)["wall"] for _ in range(flags.rounds)]
                yield {
                    **case,
                    "part": part.name,
                    "block": part.block,
                    "count": part.count,
                    "input": part.input,
                    "pass": kind,
                    "ms": 1e3 * statistics.median(walls),
                    "range_ms": [1e3 * min(walls), 1e3 * max(walls)],
                    "rounds": [1e3 * wall for wall in walls],
                    **_bound(part, kind, case, machine),
                    **prepared,
                    "time": contest.utc(),
                }


def _bound(
    part: Part, kind: str, case: dict[str, Any], machine: dict[str, Any]
) -> dict[str, float | None]:
    """What a part needs for a batch, and the least time on this machine."""
    if kind == "forward":
        return {}
    dtype, batch = case["dtype"], case["batch"]
    rates = counts.Rates(machine["matmul_flops"][dtype], machine["copy_bytes"])
    work, least = counts.total(part.layers, kind, dtype=dtype, batch=batch)
    bounds = [rates.bound(layer, kind, dtype=dtype, batch=batch) for layer in part.layers]
    return {
        "operations": batch * work,
        "least_bytes": batch * least,
        "bound_ms": 1e3 * batch * sum(bound.seconds for bound in bounds),
    }


def table(found: Sequence[Record]) -> str:
    """The parts of a network for a reader; milliseconds for a batch."""
    width = max(len(record["part"]) for record in found) + 2
    lines = [
        f"{'':<{width}}{'blocks':>6}{'input':>16}{'inference':>11}{'':>9}{'forward':>9}"
        f"{'backward':>10}{'training':>10}{'':>9}",
        f"{'':<{width}}{'':>6}{'':>16}{'ms':>11}{'of bound':>9}{'ms':>9}{'ms':>10}{'ms':>10}"
        f"{'of bound':>9}",
    ]
    sums = [0.0] * 5
    for _, group in itertools.groupby(found, lambda record: (record["part"], record["block"])):
        infer, forward, train = group
        numbers = [infer["ms"], infer["bound_ms"], forward["ms"], train["ms"], train["bound_ms"]]
        sums = [a + infer["count"] * b for a, b in zip(sums, numbers, strict=True)]
        shape = " x ".join(map(str, infer["input"]))
        lines.append(f"{infer['part']:<{width}}{infer['count']:>6}{shape:>16}{_row(*numbers)}")
    lines.append(f"{'sum of all blocks':<{width}}{'':>22}{_row(*sums)}")
    return "\n".join(lines)


def _row(infer: float, infer_bound: float, forward: float, train: float, bound: float) -> str:
    return (
        f"{infer:>11.2f}{infer_bound / infer:>9.0%}{forward:>9.2f}{train - forward:>10.2f}"
        f"{train:>10.2f}{bound / train:>9.0%}"
    )
