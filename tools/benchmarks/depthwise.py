"""Measures depthwise convolutions alone: `python tools/benchmark.py depthwise --help`.

Every shape of a network, each pass (values, gradients of the input and of the weights), in XLA's
own form (cuDNN's on a GPU) and in the shifted one: what the table of models/lowering rests on.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import arguments as shared
from benchmarks import contest, counts, own
from benchmarks.results import OWN, Record, Results, describe_machine
from effv2_jax.command import Parser

_PASSES = ("values", "of input", "of weights")


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong.
    """
    parser = Parser(__doc__, prog="tools/benchmark.py depthwise")
    shared.add_cases(parser)
    shared.add_list(parser, "--lowering", "plain,cpu", text="forms: plain, cpu (shifted)")
    shared.add_measuring(parser)
    parser.set_defaults(seconds=0.05)
    flags = parser.parse_args(arguments)
    shared.check_choice("--lowering", flags.lowering, shared.LOWERINGS)
    shared.check(flags)
    results = Results(flags.json, None, resume=flags.resume)
    for count, name, size, batch, dtype in itertools.product(
        flags.cores, flags.model, flags.image_size, flags.batch, flags.dtype
    ):
        case = {
            "kind": "depthwise", "framework": OWN, "model": name, "image_size": size,
            "batch": batch, "dtype": dtype, "cores": count,
        }  # fmt: skip
        if any(
            all(record.get(key) == value for key, value in case.items())
            for record in results.records
        ):
            continue
        cores = own.cores_of(count)
        machine = own.measure_machine(flags, cores)
        results.machines.append(machine)
        print(f"{describe_machine(machine)}\n", flush=True)
        found = list(_measure(case, flags, cores, machine))
        results.add(found)
        print(f"{name}, {size} px, batch {batch}, {dtype}\n{table(found)}\n", flush=True)


def shapes_of(model: str, image_size: int) -> list[dict[str, int]]:
    """The depthwise convolutions of a network, each shape once: side, channels, kernel, stride."""
    from effv2_jax.models.block_spec import expand_blocks
    from effv2_jax.models.variants import get_variant

    variant = get_variant(model)
    side, found = -(-image_size // 2), []
    for spec in expand_blocks(variant.blocks, width=variant.width, depth=variant.depth):
        shape = {
            "side": side,
            "channels": spec.inner_channels,
            "kernel": spec.kernel,
            "stride": spec.stride,
        }
        if not spec.fused and shape not in found:
            found.append(shape)
        side = -(-side // spec.stride)
    return found


def _measure(
    case: dict[str, Any], flags: argparse.Namespace, cores: Sequence[int], machine: dict[str, Any]
) -> Iterator[Record]:
    """Yields a record per shape, pass and form; the forms are measured in turns."""
    contestant = contest.Contestant(
        name=OWN, command=own.command("depthwise_worker.py", flags), task={}
    )
    environment = contest.environment_of(contestant, {})
    with ExitStack() as stack:
        workers = {
            form: stack.enter_context(
                contest.Worker(contestant, cores=cores, environment=environment)
            )
            for form in flags.lowering
        }
        for shape, kind in itertools.product(shapes_of(case["model"], case["image_size"]), _PASSES):
            counted = _count(case, shape)
            facts, steps, walls = {}, {}, {form: [] for form in workers}
            for form, worker in workers.items():
                task = {**case, **shape, "pass": kind, "lowering": form, "cache": flags.cache}
                facts[form] = worker.ask("prepare", **task)
                first = worker.ask("run", steps=1)["wall"]
                steps[form] = flags.steps or max(1, min(10_000, round(flags.seconds / first)))
            for _, (form, worker) in itertools.product(range(flags.rounds), workers.items()):
                walls[form].append(worker.ask("run", steps=steps[form])["wall"])
            for form, times in walls.items():
                yield {
                    **case,
                    "asked": {"lowering": form, "tuned": not flags.no_tune},
                    "part": "{channels} channels, {side} px, {kernel}x{kernel}, "
                    "stride {stride}".format(**shape),
                    **shape,
                    "pass": kind,
                    "ms": 1e3 * statistics.median(times),
                    "range_ms": [1e3 * min(times), 1e3 * max(times)],
                    "bytes_per_second": counted / statistics.median(times),
                    "share_of_copy": counted / statistics.median(times) / machine["copy_bytes"],
                    **facts[form],
                    "time": contest.utc(),
                }


def _count(case: dict[str, Any], shape: dict[str, int]) -> float:
    """Least bytes of each of the passes: two of input, output and their gradients."""
    after = -(-shape["side"] // shape["stride"])
    pixels = shape["side"] ** 2 + after**2
    return case["batch"] * pixels * shape["channels"] * counts.ITEMSIZE[case["dtype"]]


def table(found: Sequence[Record]) -> str:
    """The forms of every shape beside each other, for a reader."""
    forms = list(dict.fromkeys(record["asked"]["lowering"] for record in found))
    width = max(len(record["part"]) for record in found) + 2
    lines = [
        f"{'':<{width}}{'pass':<12}" + "".join(f"{form + ' ms':>10}{'copy':>6}" for form in forms)
    ]
    for (part, kind), group in itertools.groupby(found, lambda r: (r["part"], r["pass"])):
        cells = [f"{record['ms']:>10.3f}{record['share_of_copy']:>6.0%}" for record in group]
        lines.append(f"{part if kind == _PASSES[0] else '':<{width}}{kind:<12}{''.join(cells)}")
    return "\n".join(lines)
