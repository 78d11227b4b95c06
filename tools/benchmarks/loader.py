"""Measures whole input pipelines in turns: `python tools/benchmark.py loader --help`.

From JPEG files to training batches on the host, uint8 [N, S, S, 3]: read, decoded, cropped at
random (8 to 100 % of the area, sides 3:4 to 4:3), resized bilinearly. This project's loader with
each of its decoders, tf.data and timm's loader, each in a process of its own. Each round starts a
pipeline and times the batches once it flows; then the pipeline ends, so that none works while
another is measured.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import arguments as shared
from benchmarks import contest, peers
from benchmarks.input import write_photographs
from benchmarks.results import OWN, Record, Results
from effv2_jax.command import Parser, say
from effv2_jax.errors import UserError
from effv2_jax.startup import ALLOCATOR_VARIABLES

# Peer -> its worker, and the modules that its interpreter must have.
_PEERS = {
    "tf-data": ("tf_data_worker.py", ("tensorflow",)),
    "timm": ("timm_loader_worker.py", ("torch", "timm", "PIL")),
}
_DECODERS = {"pillow": ("PIL",), "simplejpeg": ("simplejpeg", "cv2")}
_LINKS = 64  # names for each made-up picture: an epoch must not end while it is timed

_EPILOG = """\
example:
  python tools/benchmark.py loader --cores 1,all --peer tf-data,timm \\
      --peer-python tf-data=/venvs/tf/bin/python,timm=/venvs/timm/bin/python
"per core" is images/s divided by the cores. timm's and this project's loaders try threads of the
main process and processes, and take the faster; tf.data has as many threads as cores.
"""


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong, or a contestant that failed.
    """
    flags = _parse(arguments)
    pythons = peers.interpreters(flags.peer_python, flags.peer)
    for name in flags.peer:
        if lacking := contest.missing(pythons[name], _PEERS[name][1]):
            raise UserError(
                f"--peer {name}: {pythons[name]} has no {', '.join(lacking)}; name an interpreter "
                "that has it with --peer-python"
            )
    results = Results(flags.json, None, resume=flags.resume)
    with tempfile.TemporaryDirectory() as made_up:
        folder = flags.dir or Path(made_up)
        if flags.dir is None:
            write_photographs(folder)
            _multiply(folder)
        for count, size, batch in itertools.product(flags.cores, flags.image_size, flags.batch):
            case = {"kind": "loader", "image_size": size, "batch": batch, "cores": count}
            if _is_done(case, flags, results.records):
                continue
            found = _measure(case, folder, flags, pythons)
            results.add(found)
            print(f"{size} px, batch {batch}, {count} of the cores\n{table(found)}\n", flush=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__, _EPILOG, prog="tools/benchmark.py loader")
    add = parser.add_argument
    add("--dir", type=Path, help="folder with train/CLASS/*.jpg; default: made-up 500x375 JPEGs")
    shared.add_list(parser, "--image-size", "300", int, text="pixels")
    shared.add_list(parser, "--batch", "128", int, text="images of a batch")
    shared.add_list(parser, "--cores", "all", text="numbers, or all")
    shared.add_list(parser, "--decoder", ",".join(_DECODERS), text="of this project's loader")
    shared.add_list(parser, "--peer", "", text=f"compared in turns: {', '.join(_PEERS)}")
    add("--peer-python", default="", metavar="PATH", help="interpreter, or PEER=PATH,PEER=PATH")
    shared.add_measuring(parser)
    parser.set_defaults(seconds=4.0, dtype=["float32"], devices=0, model=[])
    flags = parser.parse_args(arguments)
    shared.check(flags)
    shared.check_choice("--decoder", flags.decoder, tuple(_DECODERS))
    shared.check_choice("--peer", flags.peer, tuple(_PEERS))
    if flags.dir is not None and not (flags.dir / "train").is_dir():
        raise UserError(f"--dir {flags.dir}: there is no folder train in it")
    for name in flags.decoder:
        if lacking := contest.missing(sys.executable, _DECODERS[name]):
            raise UserError(
                f"--decoder {name}: {', '.join(lacking)} not installed; pip install "
                '"effv2_jax[fast-decode]", or leave it out'
            )
    return flags


def _multiply(folder: Path) -> None:
    """Gives every picture more names: as many files as a small data set has, in little space."""
    for file in sorted(folder.glob("train/*/*.jpg")):
        for number in range(1, _LINKS):
            os.link(file, file.with_name(f"{file.stem}_{number}.jpg"))


def _is_done(case: dict[str, Any], flags: argparse.Namespace, found: Sequence[Record]) -> bool:
    names = {
        record["framework"]
        for record in found
        if all(record.get(key) == value for key, value in case.items())
    }
    return {*(_name(decoder) for decoder in flags.decoder), *flags.peer} <= names


def _name(decoder: str) -> str:
    return f"{OWN} {decoder}"


def _measure(
    case: dict[str, Any], folder: Path, flags: argparse.Namespace, pythons: dict[str, str]
) -> list[Record]:
    size, batch, count = case["image_size"], case["batch"], case["cores"]
    task = {"folder": str(folder), "image_size": size, "batch": batch, "cores": count}
    contestants = [
        contest.Contestant(
            name=_name(decoder),
            command=contest.start("loader_worker.py", sys.executable),
            task={**task, "decoder": decoder},
        )
        for decoder in flags.decoder
    ] + [
        contest.Contestant(
            name=name,
            command=contest.start(_PEERS[name][0], pythons[name]),
            task=task,
            inherits=ALLOCATOR_VARIABLES,
        )
        for name in flags.peer
    ]
    say(f"{size} px, batch {batch}, {count} of the cores: {len(contestants)} pipelines")
    measured = contest.compete(
        contestants,
        cores=contest.usable_cores()[-count:],
        rounds=flags.rounds,
        steps=flags.steps,
        seconds=flags.seconds,
    )
    found = []
    for one in measured:
        rate, low, high = contest.rate(one, batch)
        record = {
            **case,
            "framework": one.contestant.name,
            "asked": {},
            "images_per_second": rate,
            "range": [low, high],
            "rounds": [batch / wall for wall, _ in one.rounds],
            "steps_per_round": one.steps,
            **one.facts,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "time": contest.utc(),
        }
        if one is not measured[0]:
            pairs = contest.ratios(measured[0], one)
            record |= {"ratio": [statistics.median(pairs), min(pairs), max(pairs)], "pairs": pairs}
        found.append(record)
    return found


def table(found: Sequence[Record]) -> str:
    """The pipelines of a case for a reader."""
    first = found[0]["framework"]
    lines = [f"{'':<24}{'images/s':>9} {'(range)':<20}{'per core':>9}  {first} / it"]
    for record in found:
        low, high = record["range"]
        rate = record["images_per_second"]
        ratio = "{:.2f} ({:.2f} - {:.2f})".format(*record["ratio"]) if "ratio" in record else ""
        lines.append(
            f"{record['framework']:<24}{rate:>9,.0f} {f'({low:,.0f} - {high:,.0f})':<20}"
            f"{rate / record['cores']:>9,.0f}  {ratio:<20} {record['settings']}".rstrip()
        )
    return "\n".join(lines)
