"""Measures what matters on a GPU, the most valuable first, in a given time.

    python tools/benchmark.py gpu --out gpu --minutes 30
    python tools/benchmark.py gpu --out dry --dry-run      # the same list, tiny, on any machine

Every measurement is a command of its own with a time limit of its own: one that fails or takes too
long costs its own time and nothing else. DIR has of each NAME.json, complete after every case,
NAME.txt, what it printed, and summary.txt, which is written anew after every one.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import configured, contest, own, peers
from benchmarks.results import OWN, Record, describe_machine, read
from effv2_jax import atomic
from effv2_jax.command import Parser, positive, say
from effv2_jax.errors import UserError

_RECIPE = "configs/v2s_imagenet.py"
_STEP = ("step", "--dtype", "bfloat16", "--cores", "all")
_STOP_SECONDS = 20  # for a command to end when its time is over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A measurement.

    Attributes:
        name: of its files.
        title: for readers.
        minutes: it may take.
        arguments: of tools/benchmark.py.
        tiny: the same for --dry-run.
        peer: whether timm takes part.
        environment: set beside what is there.
    """

    name: str
    title: str
    minutes: float
    arguments: tuple[str, ...]
    tiny: tuple[str, ...]
    peer: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def _step(mode: str, model: str, size: int, batch: int, *more: str) -> tuple[str, ...]:
    return (
        *(*_STEP, "--mode", mode, "--model", f"efficientnetv2-{model}"),
        *("--image-size", str(size), "--batch", str(batch), *more),
    )


def _tiny(part: str, *more: str, model: str = "testing", batch: str = "2") -> tuple[str, ...]:
    own_flags = ("--model", model, "--image-size", "32", "--batch", batch, "--rounds", "2")
    # One device: a tiny batch cannot be split among all cores of a larger machine.
    return (part, *own_flags, "--devices", "1", "--steps", "1", "--cache", *more)


def jobs() -> tuple[Job, ...]:
    """The list, the most valuable first."""
    sizes = ",".join(str(stage.image_size) for stage in configured.stages(configured.load(_RECIPE)))
    smallest = sizes.split(",")[0]
    bfloat16 = ("--dtype", "bfloat16", "--cores", "all")
    small = ("--model", "efficientnetv2-s", "--image-size", "300")
    return (
        Job(
            name="s_train_300",
            title="V2-S training at 300 px against timm's best setting; compile time, autotuned",
            minutes=8,
            arguments=_step("train", "s", 300, 128),
            tiny=_tiny("step", "--mode", "train", model="efficientnetv2-b0"),
            peer=True,
        ),
        Job(
            name="s_infer_384",
            title="V2-S inference at 384 px against timm's best setting",
            minutes=5,
            arguments=_step("infer", "s", 384, 128),
            tiny=_tiny("step", "--mode", "infer", model="efficientnetv2-b0"),
            peer=True,
        ),
        Job(
            name="m_train_384",
            title="V2-M training at 384 px against timm",
            minutes=6,
            arguments=_step("train", "m", 384, 64, "--rounds", "3"),
            tiny=_tiny("step", "--mode", "train"),
            peer=True,
        ),
        Job(
            name="l_train_384",
            title="V2-L training at 384 px against timm",
            minutes=7,
            arguments=_step("train", "l", 384, 32, "--rounds", "3"),
            tiny=_tiny("step", "--mode", "train"),
            peer=True,
        ),
        Job(
            name="s_stages",
            title="the stages of the V2-S recipe, with RandAugment, RMSProp and moving averages",
            minutes=5,
            arguments=(
                *(*_STEP, "--mode", "train", "--model", "efficientnetv2-s", "--batch", "128"),
                *("--image-size", sizes, "--recipe", "official", "--rounds", "3"),
            ),
            tiny=_tiny("step", "--mode", "train", "--recipe", "official"),
        ),
        Job(
            name="depthwise",
            title="depthwise: cuDNN against the shifted form, per pass",
            minutes=3,
            arguments=(
                "convolutions",
                "--kind",
                "depthwise",
                *small,
                "--batch",
                "64",
                *bfloat16,
                "--rounds",
                "3",
            ),
            tiny=_tiny("convolutions"),
        ),
        Job(
            name="memory",
            title="memory of V2-S, and the largest batches",
            minutes=5,
            arguments=(
                *("memory", "--model", "efficientnetv2-s", "--image-size", f"300,{smallest}"),
                *("--batch", "16,32", *bfloat16),
            ),
            tiny=_tiny("memory", batch="2,4"),
            peer=True,
        ),
        Job(
            name="s_no_autotuning",
            title="V2-S training at 300 px compiled without autotuning: seconds and speed",
            minutes=3,
            arguments=_step("train", "s", 300, 128, "--rounds", "3"),
            tiny=_tiny("step", "--mode", "train"),
            environment={"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
        ),
        Job(
            name="s_lowerings",
            title="V2-S training at 300 px: the GPU's forms against XLA's own",
            minutes=5,
            arguments=_step("train", "s", 300, 128, "--rounds", "3", "--lowering", "gpu,plain"),
            tiny=_tiny("step", "--mode", "infer", "--lowering", "gpu,plain"),
        ),
        Job(
            name="s_roofline_300",
            title="V2-S at 300 px: how near to the limit, and on what time is spent",
            minutes=4,
            arguments=("roofline", *small, "--batch", "128", *bfloat16),
            tiny=_tiny("roofline", "--mode", "infer"),
        ),
    )


def run(arguments: Sequence[str]) -> None:
    """Runs the list.

    Raises:
        UserError: arguments that are wrong, or no GPU; nothing was measured.
    """
    parser = Parser(__doc__, prog="tools/benchmark.py gpu")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for results; new or empty")
    add("--minutes", type=positive, default=30, help="for all together (%(default)s)")
    add("--peer-python", default="", metavar="PATH", help="interpreter that has timm")
    add("--dry-run", action="store_true", help="tiny sizes, on whatever is there")
    flags = parser.parse_args(arguments)
    if flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
        raise UserError(f"--out {flags.out}: is there and not empty; expected a new folder")
    pythons = peers.interpreters(flags.peer_python, ["timm"])
    lacking = contest.missing(pythons["timm"], list(peers.PEERS["timm"].modules))
    if lacking:
        say(f"{pythons['timm']} has no {', '.join(lacking)}: measured without timm (--peer-python)")
    start = time.monotonic()
    machine = own.measure_machine(
        argparse.Namespace(no_tune=False, devices=0, dtype=["bfloat16"]), contest.usable_cores()
    )
    if machine["backend"] == "cpu" and not flags.dry_run:
        raise UserError("no GPU: JAX found a CPU; install the extra cuda12, or try --dry-run")
    flags.out.mkdir(parents=True, exist_ok=True)
    print(f"{describe_machine(machine)}\n", flush=True)
    told = describe_machine(machine)
    if flags.dry_run:
        told += "\ndry run: networks and sizes are tiny, not those of the titles"
    _run_all(flags, pythons["timm"] if not lacking else None, start, told)


def _run_all(flags: argparse.Namespace, timm: str | None, start: float, machine: str) -> None:
    """Runs the jobs one after the other and keeps the summary."""
    listed, ended = jobs(), []
    for number, job in enumerate(listed):
        left = 60 * flags.minutes - (time.monotonic() - start)
        if left < 60:
            ended.append((job, "not started: no time left"))
            continue
        limit = min(60 * job.minutes, left)
        say(f"[{number + 1}/{len(listed)}] {job.title} (at most {limit / 60:.0f} min)")
        begun = time.monotonic()
        told = _run_one(job, flags, timm, limit)
        ended.append((job, f"{told}, {time.monotonic() - begun:.0f} s"))
        text = summary(ended, flags.out, machine)
        with atomic.replacing(flags.out / "summary.txt") as temporary:
            temporary.write_text(text + "\n")
    print(summary(ended, flags.out, machine))


def _run_one(job: Job, flags: argparse.Namespace, timm: str | None, limit: float) -> str:
    """Runs a job to its end or until its time is over; returns how it ended."""
    command = [*(job.tiny if flags.dry_run else job.arguments)]
    command += ["--json", str(flags.out / f"{job.name}.json")]
    if job.peer and timm and "testing" not in command:  # timm has no such network
        command += ["--peer", "timm", "--peer-python", timm]
        if command[0] == "step":
            command += ["--peer-compile", _way(flags)]
    tool = str(Path(__file__).parent.parent / "benchmark.py")
    with (flags.out / f"{job.name}.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, tool, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **job.environment},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return "stopped: its time was over"
        finally:
            _end(process)
    return "done" if code == 0 else f"failed, see {job.name}.txt"


def _way(flags: argparse.Namespace) -> str:
    """What torch.compile is worth trying: as the first measurement found."""
    if flags.dry_run:
        return "off"
    found = _records(flags.out / "s_train_300.json")
    chosen = [record["candidate"] for record in found if record["framework"] == "timm"]
    return "auto" if not chosen else "off" if chosen[0] == "eager" else "on"


def _end(process: subprocess.Popen) -> None:
    """Ends a command and all it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=_STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _records(path: Path) -> list[Record]:
    return read(path)["results"] if path.exists() else []


def summary(ended: Sequence[tuple[Job, str]], out: Path, machine: str) -> str:
    """All that was measured so far, for a reader."""
    lines = [machine]
    for job, told in ended:
        lines += ["", f"{job.title}: {told}"]
        for record in _records(out / f"{job.name}.json"):
            if line := _LINES.get(record["kind"], lambda record: "")(record):
                lines.append(f"  {line}")
    return "\n".join(lines)


def _step_line(record: Record) -> str:
    rate = f"{record['images_per_second']:,.1f} images/s"
    memory = record["device_bytes"] or record.get("program_bytes") or 0
    form = f" ({record['lowering']})" if record["lowering"] not in (None, "auto") else ""
    text = (
        f"{record['framework']}{form}: {record['model']}, {record['image_size']} px, batch "
        f"{record['batch']}, {record['mode']}: {rate}, {memory / 2**30:.1f} GiB, compiled in "
        f"{record['compile_seconds']:.0f} s, {record['share_of_matmul']:.0%} of the matrix rate, "
        f"{record['share_of_copy']:.0%} of the copy rate"
    )
    if record["framework"] != OWN:
        text += "; {} / it = {:.2f} ({:.2f} - {:.2f})".format(OWN, *record["ratio"])
    return text


def _memory_line(record: Record) -> str:
    batches = ", ".join(f"{size} GB {batch:,}" for size, batch in record["largest_batch"].items())
    return f"{record['framework']}, {record['image_size']} px: largest batch {batches}"


def _convolution_line(record: Record) -> str:
    form = record["asked"]["lowering"]
    return f"{record['part']}, {record['pass']}, {form}: {record['ms']:.3f} ms"


def _roofline_line(record: Record) -> str:
    bound = sum(row["bound_ms"] for row in record["layers"].values())
    return (
        f"{record['mode']}: {record['step_ms']:.1f} ms, {bound / record['step_ms']:.0%} of the "
        "bound; the table is in the .txt"
    )


_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step": _step_line,
    "memory": _memory_line,
    "convolutions": _convolution_line,
    "roofline": _roofline_line,
}
