"""Measures the memory of steps and says how large a batch fits: `benchmark.py memory --help`.

What a step needs beside its images is fixed, the rest grows with the batch: two batch sizes tell
both. This project's numbers are those of the compiled program, which are right on any device; a
peer's are what it had allocated on the accelerator.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks import arguments as shared
from benchmarks import contest, forms, own, peers
from benchmarks.results import OWN, Case, Record, Results
from effv2_jax.command import Parser, say
from effv2_jax.errors import UserError

_GIGABYTES = (16, 24, 80, 141)  # of accelerators, as they are sold: 10^9 bytes
_USABLE = 0.92  # the context, the libraries and gaps between buffers take the rest


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong, or a contestant that failed.
    """
    parser = Parser(__doc__, prog="tools/benchmark.py memory")
    shared.add_cases(parser, batches="16,32")
    shared.add_list(parser, "--lowering", "auto", text=forms.TEXT)
    shared.add_list(parser, "--mode", "train", text="train, infer")
    shared.add_list(parser, "--peer", "", text="timm, torchvision; on an accelerator only")
    parser.add_argument("--peer-python", default="", metavar="PATH", help="as of the part step")
    shared.add_measuring(parser)
    flags = parser.parse_args(arguments)
    forms.check("--lowering", flags.lowering)
    shared.check_choice("--mode", flags.mode, ("train", "infer"))
    shared.check_choice("--peer", flags.peer, ("timm", "torchvision"))
    shared.check(flags)
    if len(set(flags.batch)) != 2:
        raise UserError(f"--batch: {len(set(flags.batch))} sizes; expected two, such as 16,32")
    pythons = peers.interpreters(flags.peer_python, flags.peer)
    peers.check(flags.peer, flags.model, pythons)
    results = Results(flags.json, None, resume=flags.resume)
    print(header(), flush=True)
    for count, dtype, name, size, mode in itertools.product(
        flags.cores, flags.dtype, flags.model, flags.image_size, flags.mode
    ):
        case = Case(model=name, image_size=size, batch=0, dtype=dtype, cores=count, mode=mode)
        for contestant in _contestants(case, flags, pythons):
            if results.has(case, [contestant], kind="memory"):
                continue
            record = _measure(case, contestant, sorted(set(flags.batch)))
            results.add([record])
            print(line(record), flush=True)


def _contestants(
    case: Case, flags: argparse.Namespace, pythons: dict[str, str]
) -> list[contest.Contestant]:
    task = {**own.task_of(case), "compile": "off"}
    return [
        *(own.contestant(case, flags, lowering=form) for form in flags.lowering),
        *(
            peers.contestant(name, python=pythons[name], task=task, threads=case.cores)
            for name in flags.peer
        ),
    ]


def _measure(case: Case, contestant: contest.Contestant, batches: Sequence[int]) -> Record:
    """Measures two batches, each in a process of its own, and draws the line through them."""
    needed = []
    for batch in batches:
        say(f"{contestant.name}: {case.model}, {case.image_size} px, batch {batch}")
        with contest.Worker(
            contestant,
            cores=own.cores_of(case.cores),
            environment=contest.environment_of(contestant, {}),
        ) as worker:
            facts = worker.ask("prepare", **{**contestant.task, "batch": batch})
            worker.ask("run", steps=2)
            measured = worker.ask("memory")["device_bytes"]
        count = facts.get("program_bytes") if contestant.name == OWN else measured
        if count is None:
            raise UserError(f"{contestant.name}: its memory is not told on this device")
        needed.append((batch / facts.get("devices", 1), count))
    return {
        "kind": "memory",
        **{key: getattr(case, key) for key in case.__dataclass_fields__},
        "framework": contestant.name,
        "asked": dict(contestant.asked),
        **fit(needed),
        "device": facts["device"],
        "time": contest.utc(),
    }


def fit(needed: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """What two (batch of a device, bytes) say: bytes of every batch, and the largest batches."""
    (few, low), (many, high) = needed
    per_image = (high - low) / (many - few)
    fixed = low - few * per_image
    return {
        "bytes": {str(batch): count for batch, count in needed},
        "fixed_bytes": fixed,
        "bytes_per_image": per_image,
        "largest_batch": {str(size): largest(fixed, per_image, size) for size in _GIGABYTES},
    }


def largest(fixed: float, per_image: float, gigabytes: float) -> int:
    """The largest batch for a device with so much memory; a multiple of 8 from 8 on."""
    batch = int((_USABLE * gigabytes * 1e9 - fixed) / per_image)
    return max(0, batch - batch % 8 if batch >= 8 else batch)


def header() -> str:
    """The line above `line`s."""
    sizes = "".join(f"{f'{size} GB':>8}" for size in _GIGABYTES)
    return f"{'':<56}{'fixed MiB':>10}{'MiB/image':>11}{sizes}"


def line(record: Record) -> str:
    """A record for a reader: batches are those of one device."""
    form = record["asked"].get("lowering", "auto")
    name = (
        f"{record['framework']}{'' if form == 'auto' else ' ' + form}: {record['model']}, "
        f"{record['image_size']} px, {record['dtype']}, {record['mode']}"
    )
    cells = "".join(f"{batch:>8,}" for batch in record["largest_batch"].values())
    return (
        f"{name:<56}{record['fixed_bytes'] / 2**20:>10,.0f}"
        f"{record['bytes_per_image'] / 2**20:>11.1f}{cells}"
    )
