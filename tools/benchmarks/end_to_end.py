"""Measures a real run beside its step alone: `python tools/benchmark.py end-to-end --help`.

Runs `python -m effv2_jax.main` on a folder of JPEG files (made up, or --dir), from files to updated
weights, and the very step of that run with a batch that lies ready, before and after it. What the
run loses is what it waits for its input (its own data_wait) and what the rest of its loop costs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import arguments as shared
from benchmarks import configured, contest, own
from benchmarks.input import write_photographs
from benchmarks.results import Case, Record, Results, describe_machine
from effv2_jax.command import Parser, say
from effv2_jax.errors import UserError

_CLASSES = 1000  # of the network, however many the folder has
_LOGGED = 8  # parts of the run that are timed; the first, in which queues fill, does not count

_EPILOG = """\
--set KEY=VALUE sets a key of the config, as --config.KEY=VALUE does for a run:
  python tools/benchmark.py end-to-end --set data.decoder=simplejpeg --set data.workers=2
The step is measured before and after the run, so a machine that changes meanwhile shows.
"""


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong, or a run that failed.
    """
    parser = Parser(__doc__, _EPILOG, prog="tools/benchmark.py end-to-end")
    add = parser.add_argument
    add("--config", default="configs/folder.py:scratch", help="the recipe (%(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config")
    add("--dir", type=Path, help="folder with train/ and val/; default: made-up 500x375 JPEGs")
    shared.add_cases(parser)
    shared.add_measuring(parser, rounds=3)
    parser.set_defaults(seconds=20.0)
    flags = parser.parse_args(arguments)
    shared.check(flags)
    for flag in ("model", "image_size", "batch", "dtype", "cores"):
        if len(getattr(flags, flag)) > 1:
            raise UserError(f"--{flag.replace('_', '-')}: several; expected one: a run has one")
    results = Results(flags.json, None, resume=flags.resume)
    with tempfile.TemporaryDirectory() as folder:
        record, machine = measure(flags, Path(folder))
    results.machines.append(machine)
    results.add([record])
    print(report(record))


def measure(flags: argparse.Namespace, folder: Path) -> tuple[Record, dict[str, Any]]:
    """Measures the step, the run, and the step again; `folder` is empty."""
    overrides = _overrides(flags, folder)
    case = Case(
        model=flags.model[0], image_size=flags.image_size[0], batch=flags.batch[0],
        dtype=flags.dtype[0], cores=flags.cores[0], mode="train", recipe=flags.config, stage=0,
    )  # fmt: skip
    configured.load(flags.config, devices=flags.devices, overrides=overrides)  # is it right?
    cores = own.cores_of(case.cores)
    machine = own.measure_machine(flags, cores)
    print(f"{describe_machine(machine)}\n", flush=True)
    contestant = own.contestant(case, flags, overrides=overrides)
    environment = contest.environment_of(contestant, {})
    with contest.Worker(contestant, cores=cores, environment=environment) as worker:
        say(f"the step alone: {case}")
        facts = worker.ask("prepare", **contestant.task)
        first = min(worker.ask("run", steps=1)["wall"] for _ in range(2))
        count = max(1, round(1.0 / first))
        walls = [worker.ask("run", steps=count)["wall"] for _ in range(flags.rounds)]
        steps = flags.steps or max(2 * _LOGGED, round(flags.seconds / first))
        say(f"the run: {steps} steps")
        logged = _run(flags, overrides, folder, steps=steps, cores=cores)
        say("the step alone again")
        walls += [worker.ask("run", steps=count)["wall"] for _ in range(flags.rounds)]
    rates = [case.batch / wall for wall in walls]
    running = [line["images_per_second"] for line in logged]
    step, whole = statistics.median(rates), statistics.median(running)
    return {
        "kind": "end-to-end",
        **{key: getattr(case, key) for key in case.__dataclass_fields__},
        "framework": contestant.name,
        "asked": {**contestant.asked, "set": flags.set, "made_up": flags.dir is None},
        "images_per_second": whole,
        "range": [min(running), max(running)],
        "data_wait": statistics.median(line["data_wait"] for line in logged),
        "step_images_per_second": step,
        "step_range": [min(rates), max(rates)],
        "step_rounds": rates,
        "lost": 1 - whole / step,
        "steps": steps,
        "settings": facts["settings"],
        "versions": facts["versions"],
        "time": contest.utc(),
    }, machine


def _overrides(flags: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The keys of the run's config: one stage of the asked size, no more evaluation than needed."""
    overrides = {
        "model.name": flags.model[0],
        "model.num_classes": str(_CLASSES),
        "model.dtype": flags.dtype[0],
        "data.source": "folder",
        "data.dir": str(flags.dir or folder / "photographs"),
        "train.batch_size": str(flags.batch[0]),
        "train.warmup_epochs": "0",
        "progressive.preset": "none",
        "progressive.image_size": str(max(17, flags.image_size[0])),  # up to 16 it is a factor
        "eval.image_size": "32",
        "eval.batch_size": str(flags.batch[0]),
        "eval.every_epochs": "1e9",
        "runtime.devices": str(flags.devices),
        "runtime.tensorboard": "false",
        "runtime.checkpoint_every_minutes": "1e9",
    }
    for text in flags.set:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--set {text}: expected KEY=VALUE, such as data.workers=2")
        overrides[key] = value
    return overrides


def _run(
    flags: argparse.Namespace,
    overrides: dict[str, str],
    folder: Path,
    *,
    steps: int,
    cores: Sequence[int],
) -> list[dict[str, Any]]:
    """Trains and returns the lines of the run's log, without the first."""
    if flags.dir is None:
        write_photographs(folder / "photographs")
        for kind in (folder / "photographs" / "train").iterdir():
            target = folder / "photographs" / "val" / kind.name
            target.mkdir(parents=True)
            shutil.copy(min(kind.iterdir()), target)
    data = Path(overrides["data.dir"]) / "train"
    examples = sum(len(files) for _, _, files in os.walk(data))
    if not examples:
        raise UserError(f"--dir {flags.dir}: {data} has no files; expected a folder of classes")
    overrides = {
        **overrides,
        # Rounded down to whole steps: the middle of the last one.
        "train.epochs": repr((steps + 0.5) * flags.batch[0] / examples),
        "runtime.log_every_steps": str(max(1, steps // _LOGGED)),
    }
    command = [
        sys.executable, "-m", "effv2_jax.main", "--config", flags.config,
        "--workdir", str(folder / "run"), *(["--no-tune"] if flags.no_tune else []),
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]  # fmt: skip
    with contest.bound(cores):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["without a word"]
        raise UserError(f"the run ended with {done.returncode}: {words[-1]}")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [line for line in found if "images_per_second" in line][1:]


def report(record: Record) -> str:
    """What was measured, for a reader."""
    return (
        f"{'':<16}{'images/s':>10}  (range)\n"
        f"{'step alone':<16}{record['step_images_per_second']:>10,.1f}  "
        f"({record['step_range'][0]:,.1f} - {record['step_range'][1]:,.1f})\n"
        f"{'the run':<16}{record['images_per_second']:>10,.1f}  "
        f"({record['range'][0]:,.1f} - {record['range'][1]:,.1f})\n"
        f"the run is {record['lost']:.1%} slower than its step; it waited "
        f"{record['data_wait']:.1%} of its time for input"
    )
