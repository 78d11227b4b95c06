"""Measures training and inference steps: `python tools/benchmark.py step --help`.

The programs are those of a run (`training/step.py`), compiled ahead for the data mesh; images and
labels are random and valid. Lowerings of one model, and other frameworks (--peer), are measured in
turns, each in a process of its own, so that whatever else the machine does falls on all alike.
Ratios are taken pair by pair; medians are given with the range of the rounds.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import configured, contest, peers
from benchmarks.results import OWN, Case, Results, describe_machine, records, settings, table
from effv2_jax.command import Parser, check_output, say
from effv2_jax.errors import UserError

_DTYPES = ("float32", "bfloat16")
_LOWERINGS = ("auto", "plain", "cpu")
_MODES = ("train", "infer")
_RECIPES = ("plain", "official")
_NUM_CLASSES = 1000

_EPILOG = """\
examples:
  python tools/benchmark.py step --model efficientnetv2-s --batch 8,16 --cores 1,all
  python tools/benchmark.py step --peer timm,keras-tf \\
      --peer-python timm=/venvs/timm/bin/python,keras-tf=/venvs/tf/bin/python
  python tools/benchmark.py step --recipe configs/v2s_imagenet.py --json v2s.json

Columns: "matmul" and "copy" are shares of what matrix products and copies reach on this machine,
in operations (a multiply-add is two) and in the least bytes that the network needs
(docs/performance.md). Memory in MiB: "program" as the compiler planned it, for each device;
"device" the accelerator's at most; "process" by how much the process grew since its framework was
imported, what compiling left behind included. Of a peer's ways to compute (--peer-compile auto)
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
    cases = list(cases_of(flags))
    pythons = peers.interpreters(flags.peer_python, flags.peer)
    peers.check(flags.peer, flags.model, pythons)
    machines: dict[int, Any] = {}
    told: set[str] = set()
    failed = 0
    for number, case in enumerate(cases):
        contestants = _contestants(case, flags, pythons, results)
        if results.has(case, contestants):
            continue
        say(f"[{number + 1}/{len(cases)}] {case}")
        cores = _cores(case.cores)
        if case.cores not in machines:
            machines[case.cores] = _machine(flags, cores)
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

    def add_list(flag: str, default: str, kind: type = str, *, text: str) -> None:
        def read(value: str) -> list[Any]:
            return [kind(part) for part in value.split(",") if part]

        read.__name__ = f"list of {kind.__name__}"  # argparse names it in its message
        shown = f"{text} ({default})" if default else text
        parser.add_argument(flag, default=read(default), type=read, help=shown)

    add_list("--model", "efficientnetv2-b0", text="names of models")
    add_list("--image-size", "192", int, text="pixels")
    add_list("--batch", "8", int, text="global batch sizes")
    add_list("--dtype", "float32", text=" or ".join(_DTYPES))
    add_list("--cores", "all", text="of the host: numbers, or all")
    add_list("--lowering", "auto", text=f"compared in turns: {', '.join(_LOWERINGS)}")
    add_list("--mode", "train,infer", text="which steps")
    add_list("--peer", "", text=f"compared in turns: {', '.join(peers.PEERS)}")
    add = parser.add_argument
    add("--peer-python", default="", metavar="PATH", help="interpreter, or PEER=PATH,PEER=PATH")
    add("--peer-compile", choices=peers.COMPILE, default="auto", help="auto: the faster way")
    add(
        "--recipe",
        default="plain",
        help="plain (SGD and no more), official, or configs/NAME.py: each of its stages",
    )
    add("--devices", type=int, default=0, help="of the data mesh; 0: all")
    add("--rounds", type=int, default=5, help="in turns over the contestants")
    add("--seconds", type=float, default=1.0, help="of a round, about")
    add("--steps", type=int, default=0, help="of a round, exactly; 0: by --seconds")
    add("--json", type=Path, metavar="FILE", help="write all numbers there, after every case")
    add("--csv", type=Path, metavar="FILE", help="the same with timm's column names")
    add("--resume", action="store_true", help="keep what --json has; measure what is missing")
    add("--cache", action="store_true", help="use the compilation cache of the commands")
    add("--no-tune", action="store_true", help="leave allocator and XLA flags as they are")
    flags = parser.parse_args(arguments)
    _check(flags)
    return flags


def _check(flags: argparse.Namespace) -> None:
    """Refuses values that nothing could be measured with."""
    from effv2_jax.models.variants import get_variant

    for flag, values, allowed in (
        ("--dtype", flags.dtype, _DTYPES),
        ("--lowering", flags.lowering, _LOWERINGS),
        ("--mode", flags.mode, _MODES),
        ("--peer", flags.peer, tuple(peers.PEERS)),
    ):
        for value in values:
            if value not in allowed:
                raise UserError(f"{flag}: {value!r}; expected {', '.join(allowed)}")
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
    if flags.recipe != "plain" and flags.peer:
        raise UserError(
            f"--recipe {flags.recipe} with --peer {','.join(flags.peer)}: peers train with plain "
            "SGD; compare with --recipe plain"
        )
    check_output("--json", flags.json and str(flags.json), endings=(".json",))
    check_output("--csv", flags.csv and str(flags.csv), endings=(".csv",))
    if flags.resume and flags.json is None:
        raise UserError("--resume: no file to continue; name it with --json")


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


def _contestants(
    case: Case, flags: argparse.Namespace, pythons: dict[str, str], results: Results
) -> list[contest.Contestant]:
    """This project in its lowerings, and the peers."""
    task = {
        "model": case.model,
        "num_classes": _NUM_CLASSES,
        "image_size": case.image_size,
        "batch": case.batch,
        "dtype": case.dtype,
        "mode": case.mode,
    }
    own = {
        **task,
        "recipe": case.recipe,
        "config": case.recipe if case.stage is not None else "",
        "stage": case.stage,
        "devices": flags.devices,
        "cache": flags.cache,
    }
    arguments = ("--no-tune",) if flags.no_tune else ()
    found = [
        contest.Contestant(
            name=OWN,
            command=contest.start("effv2_worker.py", sys.executable, *arguments),
            task={**own, "lowering": lowering},
            environment=_accelerator_share(len(flags.lowering) + len(flags.peer)),
            asked={"lowering": lowering, "devices": flags.devices, "tuned": not flags.no_tune},
        )
        for lowering in flags.lowering
    ]
    for name in flags.peer:
        theirs = {**task, "compile": flags.peer_compile}
        peer = peers.contestant(name, python=pythons[name], task=theirs, threads=case.cores)
        way = results.candidate(case, name, peer.asked)
        found.append(dataclasses.replace(peer, task={**peer.task, "candidate": way}))
    return found


def _accelerator_share(contestants: int) -> dict[str, str]:
    """JAX takes three quarters of an accelerator's memory for itself; others need some too."""
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.75 if contestants == 1 else 0.9 / contestants:.2f}"
    }


def _cores(count: int) -> list[int]:
    """The last cores: the system's own work prefers the first."""
    return contest.usable_cores()[-count:]


def _machine(flags: argparse.Namespace, cores: Sequence[int]) -> dict[str, Any]:
    """What the machine reaches with these cores."""
    arguments = ("--no-tune",) if flags.no_tune else ()
    asked = contest.Contestant(
        name="the machine",
        command=contest.start("rates_worker.py", sys.executable, *arguments),
        task={"devices": flags.devices, "dtypes": flags.dtype},
    )
    environment = contest.environment_of(asked, {})
    with contest.Worker(asked, cores=cores, environment=environment) as worker:
        return worker.ask("prepare", **asked.task)
