"""Measures training and inference steps: `python tools/benchmark.py step --help`.

The programs are those of a run (`training/step.py`), compiled ahead for the data mesh; images and
labels are random and valid. Lowerings of one model, and other frameworks (--peer), are measured in
turns, each in a process of its own, so that whatever else the machine does falls on all alike.
Ratios are taken pair by pair; medians are given with the range of the rounds.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import arguments as shared
from benchmarks import configured, contest, counts, forms, own, peers
from benchmarks.results import Case, Results, describe_machine, records, settings, table
from effv2_jax.command import Parser, check_output, say
from effv2_jax.errors import UserError

_MODES = ("train", "infer")
_RECIPES = ("plain", "official")

_EPILOG = """\
examples:
  python tools/benchmark.py step --model efficientnetv2-s --batch 8,16 --cores 1,all
  python tools/benchmark.py step --peer timm,keras-tf \\
      --peer-python timm=/venvs/timm/bin/python,keras-tf=/venvs/tf/bin/python
  python tools/benchmark.py step --recipe configs/v2s_imagenet.py --json v2s.json

Columns: "matmul" and "copy" are shares of what matrix products and copies reach on this machine,
in operations (a multiply-add is two) and in the least bytes that the network needs
(docs/performance.md). Memory in MiB: "program" as the compiler planned it, for each device;
"device" the accelerator's at most; "step" by how much the process grows in a step over what stays
between two; "process" by how much it grew since its framework was imported, what compiling left
behind included. Of a peer's ways to compute (--peer-compile auto)
the faster is found once for each network, image size and number of cores, at the first batch size.
"""


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong; nothing was measured. Or contestants that failed; the
            others were measured.
    """
    flags = parse(arguments)
    results = Results(flags.json, flags.csv, resume=flags.resume)
    measure(flags, results)


def measure(flags: argparse.Namespace, results: Results) -> None:
    """Measures all cases of the flags; see `run`."""
    pythons = peers.interpreters(flags.peer_python, flags.peer)
    peers.check(flags.peer, flags.model, pythons)
    cases = [case for case in cases_of(flags) if not is_done(case, flags, results)]
    if len(cases) > 1:
        say(estimate(cases, flags))
    machines: dict[int, Any] = {}
    told: set[str] = set()
    failed = 0
    for number, case in enumerate(cases):
        contestants = _contestants(case, flags, pythons, results)
        say(f"[{number + 1}/{len(cases)}] {case}")
        cores = own.cores_of(case.cores)
        if case.cores not in machines:
            machines[case.cores] = own.measure_machine(flags, cores)
            results.machines.append(machines[case.cores])
            print(f"{describe_machine(machines[case.cores])}\n", flush=True)
        try:
            measured = contest.compete(
                contestants,
                cores=cores,
                rounds=flags.rounds,
                steps=flags.steps,
                seconds=flags.seconds,
            )
        except contest.ContestError as error:
            if len(cases) == 1:
                raise
            say(f"error: {error}")
            failed += 1
            continue
        found = records(case, measured, machines[case.cores])
        results.add(found)
        for line in dict.fromkeys(map(settings, found)):
            if line not in told:
                print(line)
                told.add(line)
        print(f"{table(case, found)}\n", flush=True)
    if failed:
        raise UserError(f"{failed} of {len(cases)} cases failed, see above; the others are written")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the flags; lists are separated by commas."""
    parser = Parser(__doc__.splitlines()[0], _EPILOG, prog="tools/benchmark.py step")
    shared.add_cases(parser)
    add_flags(parser)
    return read_flags(parser, arguments)


def add_flags(parser: Parser, *, peers_default: str = "") -> None:
    """Adds all flags but those of what is measured."""
    add_list, add = shared.add_list, parser.add_argument
    add_list(parser, "--lowering", "auto", text=f"compared in turns: {forms.TEXT}")
    add_list(parser, "--mode", "train,infer", text="which steps")
    add_list(parser, "--peer", peers_default, text=f"compared in turns: {', '.join(peers.PEERS)}")
    add("--peer-python", default="", metavar="PATH", help="interpreter, or PEER=PATH,PEER=PATH")
    add("--peer-compile", choices=peers.COMPILE, default="auto", help="auto: the faster way")
    add(
        "--recipe",
        default="plain",
        help="plain (SGD and no more), official, or configs/NAME.py: each of its stages",
    )
    shared.add_measuring(parser)
    add("--csv", type=Path, metavar="FILE", help="the same with timm's column names")


def read_flags(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the flags and refuses values that nothing could be measured with."""
    flags = parser.parse_args(arguments)
    for flag, values, allowed in (
        ("--mode", flags.mode, _MODES),
        ("--peer", flags.peer, tuple(peers.PEERS)),
    ):
        shared.check_choice(flag, values, allowed)
    forms.check("--lowering", flags.lowering)
    shared.check(flags)
    if flags.recipe != "plain" and flags.peer:
        raise UserError(
            f"--recipe {flags.recipe} with --peer {','.join(flags.peer)}: peers train with plain "
            "SGD; compare with --recipe plain"
        )
    check_output("--csv", flags.csv and str(flags.csv), endings=(".csv",))
    return flags


def cases_of(flags: argparse.Namespace) -> Iterator[Case]:
    """Yields what to measure, the cheap before the dear; needs no JAX."""
    if flags.recipe not in _RECIPES:
        config = configured.load(flags.recipe)
        flags.model, flags.mode = [config.model.name], ["train"]
        for dtype, cores, stage in itertools.product(
            flags.dtype, flags.cores, configured.stages(config)
        ):
            yield Case(
                model=config.model.name,
                image_size=stage.image_size,
                batch=stage.batch_size,
                dtype=dtype,
                cores=cores,
                mode="train",
                recipe=flags.recipe,
                stage=stage.index,
            )
        return
    for dtype, cores, name, size, batch, mode in itertools.product(
        flags.dtype, flags.cores, flags.model, flags.image_size, flags.batch, flags.mode
    ):
        yield Case(
            model=name,
            image_size=size,
            batch=batch,
            dtype=dtype,
            cores=cores,
            mode=mode,
            recipe=flags.recipe,
        )


def is_done(case: Case, flags: argparse.Namespace, results: Results) -> bool:
    """Whether a case was measured with all contestants, told to compute as they are now."""
    pythons = peers.interpreters(flags.peer_python, flags.peer)
    return results.has(case, _contestants(case, flags, pythons, results))


# For estimates: what a usual core reaches in a network, and seconds to start and to compile.
_CORE_FLOPS = 5e10
_START, _COMPILE = 15, 25
_PEER_COMPILE, _PEER_TRIES = 60, 90  # torch.compile: for every case; to find out whether it pays


def estimate(cases: Sequence[Case], flags: argparse.Namespace) -> str:
    """Says about how long the cases take; only a first idea, before anything was measured."""
    from effv2_jax.models.variants import get_variant

    seconds, tried = 0.0, set()
    for case in cases:
        layers = counts.count_layers(get_variant(case.model), image_size=case.image_size)
        work, _ = counts.total(layers, case.mode, dtype=case.dtype, batch=case.batch)
        step = case.batch * work / (_CORE_FLOPS * case.cores)
        one = _START + (flags.rounds * max(1, flags.steps) + 3) * step
        one += 0 if flags.steps else flags.rounds * max(0.0, flags.seconds - step)
        seconds += one * (len(flags.lowering) + len(flags.peer)) + _COMPILE * len(flags.lowering)
        kind = dataclasses.replace(case, batch=0)
        if flags.peer_compile != "off":
            torch = [name for name in flags.peer if "torch" in peers.PEERS[name].modules]
            seconds += (_PEER_COMPILE + _PEER_TRIES * (kind not in tried)) * len(torch)
            tried.add(kind)
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{len(cases)} cases, very roughly {hours} h {minutes:02d} min on an idle machine"


def _contestants(
    case: Case, flags: argparse.Namespace, pythons: dict[str, str], results: Results
) -> list[contest.Contestant]:
    """This project in its lowerings, and the peers."""
    count = len(flags.lowering) + len(flags.peer)
    found = [
        own.contestant(case, flags, lowering=lowering, contestants=count)
        for lowering in flags.lowering
    ]
    for name in flags.peer:
        theirs = {**own.task_of(case), "compile": flags.peer_compile}
        peer = peers.contestant(name, python=pythons[name], task=theirs, threads=case.cores)
        way = results.candidate(case, name, peer.asked)
        found.append(dataclasses.replace(peer, task={**peer.task, "candidate": way}))
    return found
