"""Measures convolutions alone: `python tools/benchmark.py convolutions --help`.

Every shape of a network, each pass (values, gradients of the input and of the weights), in XLA's
own form (cuDNN's on a GPU) and in those of models/lowering: what their table rests on.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import arguments as shared
from benchmarks import contest, counts, forms, own
from benchmarks.results import OWN, Record, Results, describe_machine
from effv2_jax.command import Parser

KINDS = ("depthwise", "dense", "pointwise")
_PASSES = ("values", "of input", "of weights")


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong.
    """
    parser = Parser(__doc__, prog="tools/benchmark.py convolutions")
    shared.add_cases(parser)
    shared.add_list(parser, "--kind", ",".join(KINDS), text="of convolutions")
    shared.add_list(parser, "--lowering", "plain,cpu", text="forms: plain, cpu, gpu")
    shared.add_measuring(parser)
    parser.set_defaults(seconds=0.05)
    flags = parser.parse_args(arguments)
    shared.check_choice("--kind", flags.kind, KINDS)
    shared.check_choice("--lowering", flags.lowering, forms.LOWERINGS)
    shared.check(flags)
    results = Results(flags.json, None, resume=flags.resume)
    for count, name, size, batch, dtype in itertools.product(
        flags.cores, flags.model, flags.image_size, flags.batch, flags.dtype
    ):
        case = {
            "kind": "convolutions", "framework": OWN, "model": name, "image_size": size,
            "batch": batch, "dtype": dtype, "cores": count,
        }  # fmt: skip
        there = {
            record["type"]
            for record in results.records
            if all(record.get(key) == value for key, value in case.items())
        }
        kinds = [kind for kind in flags.kind if kind not in there]
        if not kinds:
            continue
        cores = own.cores_of(count)
        machine = own.measure_machine(flags, cores)
        results.machines.append(machine)
        print(f"{describe_machine(machine)}\n", flush=True)
        found = list(_measure(case, kinds, flags, cores, machine))
        results.add(found)
        print(f"{name}, {size} px, batch {batch}, {dtype}\n{table(found)}\n", flush=True)


def shapes_of(model: str, image_size: int, kinds: Sequence[str] = KINDS) -> list[dict[str, Any]]:
    """The convolutions of a network's blocks, each shape once.

    Returns:
        "type" (one of KINDS), "side" of the input, "channels", "filters", "kernel", "stride".
    """
    from effv2_jax.models.block_spec import expand_blocks
    from effv2_jax.models.variants import get_variant

    variant = get_variant(model)
    side, found = -(-image_size // 2), []
    for spec in expand_blocks(variant.blocks, width=variant.width, depth=variant.depth):
        after = -(-side // spec.stride)
        inner, k, stride = spec.inner_channels, spec.kernel, spec.stride
        if not spec.expands and spec.fused:
            layers = [("dense", side, spec.in_channels, spec.channels, k, stride)]
        elif spec.fused:
            layers = [("dense", side, spec.in_channels, inner, k, stride)]
        else:
            layers = [("pointwise", side, spec.in_channels, inner, 1, 1)] * spec.expands
            layers += [("depthwise", side, inner, inner, k, stride)]
        if spec.expands or not spec.fused:
            layers += [("pointwise", after, inner, spec.channels, 1, 1)]
        names = ("type", "side", "channels", "filters", "kernel", "stride")
        for layer in layers:
            shape = dict(zip(names, layer, strict=True))
            if shape["type"] in kinds and shape not in found:
                found.append(shape)
        side = after
    return sorted(found, key=lambda shape: KINDS.index(shape["type"]))


def _measure(
    case: dict[str, Any],
    kinds: Sequence[str],
    flags: argparse.Namespace,
    cores: Sequence[int],
    machine: dict[str, Any],
) -> Iterator[Record]:
    """Yields a record per shape, pass and form; the forms are measured in turns."""
    contestant = contest.Contestant(
        name=OWN, command=own.command("convolution_worker.py", flags), task={}
    )
    environment = contest.environment_of(contestant, {})
    with ExitStack() as stack:
        workers = {
            form: stack.enter_context(
                contest.Worker(contestant, cores=cores, environment=environment)
            )
            for form in flags.lowering
        }
        shapes = shapes_of(case["model"], case["image_size"], kinds)
        for shape, kind in itertools.product(shapes, _PASSES):
            operations, moved = _count(case, shape)
            bound = max(
                operations / machine["matmul_flops"][case["dtype"]], moved / machine["copy_bytes"]
            )
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
                    "part": "{type}, {channels} to {filters} channels, {side} px, "
                    "{kernel}x{kernel}, stride {stride}".format(**shape),
                    **shape,
                    "pass": kind,
                    "ms": 1e3 * statistics.median(times),
                    "range_ms": [1e3 * min(times), 1e3 * max(times)],
                    "flops": operations / statistics.median(times),
                    "bytes_per_second": moved / statistics.median(times),
                    "share_of_bound": bound / statistics.median(times),
                    **facts[form],
                    "time": contest.utc(),
                }


def _count(case: dict[str, Any], shape: dict[str, Any]) -> tuple[float, float]:
    """Operations and least bytes of each pass: it reads or writes input, output and kernel once."""
    after = -(-shape["side"] // shape["stride"])
    read = shape["side"] ** 2 * shape["channels"]
    written = after**2 * shape["filters"]
    fan_in = 1 if shape["type"] == "depthwise" else shape["channels"]
    taps = shape["kernel"] ** 2 * fan_in
    size = counts.ITEMSIZE[case["dtype"]]
    return (
        2.0 * case["batch"] * written * taps,
        float(size * (case["batch"] * (read + written) + taps * shape["filters"])),
    )


def table(found: Sequence[Record]) -> str:
    """The forms of every shape beside each other, for a reader.

    "limit": share of the machine's, by operations or by bytes; Winograd's form needs fewer
    operations than are counted and can be above 100 %.
    """
    forms = list(dict.fromkeys(record["asked"]["lowering"] for record in found))
    width = max(len(record["part"]) for record in found) + 2
    lines = [
        f"{'':<{width}}{'pass':<12}" + "".join(f"{form + ' ms':>10}{'limit':>7}" for form in forms)
    ]
    for (part, kind), group in itertools.groupby(found, lambda r: (r["part"], r["pass"])):
        cells = [f"{record['ms']:>10.3f}{record['share_of_bound']:>7.0%}" for record in group]
        lines.append(f"{part if kind == _PASSES[0] else '':<{width}}{kind:<12}{''.join(cells)}")
    return "\n".join(lines)
