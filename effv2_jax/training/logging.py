"""What a run says: metrics.jsonl, TensorBoard events, and the terminal.

    with MetricsLogger(workdir.path, stages, num_examples=n, resume_step=step) as logger:
        logger.begin_stage(stages[0])
        for step in ...:
            state, metrics = train_step(state, batch, knobs)
            logger.step(step, data_wait=seconds_waited_for_the_batch)
            if step % log_every == 0:
                logger.train(step, metrics)             # fetches the metrics from the device
            if step in evaluation_steps:
                jax.block_until_ready(state)
                with logger.paused():                   # not counted in images/s
                    results = evaluate(...)
                logger.evaluation(step, results)

`step` is everywhere the number of finished steps. Only process 0 writes and prints; on the others
all methods do nothing, so that the loop needs no conditions.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from effv2_jax.atomic import replacing

_REFRESH_SECONDS = 0.1  # of the live line: fast enough for the eye, no load for the terminal


class MetricsLogger:
    """Writes and prints what the run measures.

    Args:
        folder: the workdir.
        stages: `progressive.Stage`s of the whole run: for epoch, image size, batch size and ETA.
        num_examples: training examples in an epoch.
        resume_step: the step the run continues from; later records, of work that is done again,
            are removed, so that the file has each step once.
        tensorboard: also write event files, into folder/tensorboard.
        stream: the terminal; None: standard output.
        active: whether this process writes; None: only process 0 does.
    """

    def __init__(
        self,
        folder: str | Path,
        stages: Sequence[Any],
        *,
        num_examples: int,
        resume_step: int = 0,
        tensorboard: bool = True,
        stream: TextIO | None = None,
        active: bool | None = None,
    ) -> None:
        self._stages = tuple(stages)
        self._num_examples = num_examples
        self._active = _is_writer() if active is None else active
        self._clock = _Clock()
        self._terminal = _Terminal(sys.stdout if stream is None else stream)
        self._file = self._events = None
        self._latest: dict[str, float] = {}
        self._known: set[tuple[str, int]] = set()
        if not self._active:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = repair(path, last_step=resume_step)
        self._known = {(r.get("split", ""), r["step"]) for r in kept if r["step"] == resume_step}
        self._file = path.open("ab", buffering=0)  # a line is one write: whole or not there
        if tensorboard:
            from tensorboardX import SummaryWriter  # here: it takes a second to import

            self._events = SummaryWriter(
                str(folder / "tensorboard"), purge_step=resume_step + 1, flush_secs=30
            )

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._active:
            self._terminal.line(text)

    def begin_stage(self, stage: Any) -> None:
        """Announces a stage and starts its clock: call when its program is compiled."""
        self._clock.reset()
        self.say(
            f"stage {stage.index + 1}/{len(self._stages)}: {stage.image_size} px, "
            f"batch {stage.batch_size}, steps {stage.start_step}..{stage.end_step}"
        )

    def step(self, step: int, *, data_wait: float = 0.0) -> None:
        """Counts a step whose work is handed to the device.

        Args:
            step: finished steps, this one included.
            data_wait: seconds the loop waited for its batch.
        """
        stage = self._stage(step)
        self._clock.count(stage.batch_size, data_wait)
        if self._active and self._terminal.live:
            self._terminal.update(lambda: self._progress(step))

    def train(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Records the metrics of the training step, with the throughput since the last record.

        Args:
            step: finished steps, the measured one included.
            metrics: scalars; arrays on the device are fetched, which waits for the step.

        Returns:
            The record, as written.
        """
        values = {key: float(value) for key, value in metrics.items()}
        images_per_second, data_wait = self._clock.read()
        if images_per_second is not None:
            values["images_per_second"] = images_per_second
            values["data_wait"] = data_wait
        self._latest = values
        record = self._record("train", step, values)
        if self._active and not self._terminal.live:
            self._terminal.line(self._progress(step))
        return record

    def evaluation(
        self, step: int, metrics: Mapping[str, Any], *, split: str = "eval"
    ) -> dict[str, Any]:
        """Records and prints the metrics of an evaluation.

        Args:
            step: finished steps.
            metrics: loss, top1, top5 of the raw weights; ema_loss, ema_top1, ema_top5.
            split: what was evaluated.

        Returns:
            The record, as written.
        """
        values = {key: float(value) for key, value in metrics.items()}
        record = self._record(split, step, values)
        shown = ", ".join(f"{key} {_show(key, value)}" for key, value in values.items())
        self.say(f"{split} at step {step} (epoch {record['epoch']:.1f}): {shown}")
        return record

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block (evaluation, compiling, saving) does not count in images/s.

        Wait for the device before: steps still queued would run on unmeasured time.
        """
        self._clock.stop()
        try:
            yield
        finally:
            self._clock.start()

    def epoch(self, step: int) -> float:
        """Epochs after `step` steps: examples seen / examples there are."""
        stage = self._stage(step)
        seen = stage.first_example + (step - stage.start_step) * stage.batch_size
        return seen / self._num_examples

    def eta_seconds(self, step: int) -> float | None:
        """Seconds to the end of the training steps; None before the first step.

        Taken to be proportional to the pixels still to come: a later stage has larger images.
        """
        rate = self._clock.lifetime_rate()
        if rate is None:
            return None
        current = self._stage(step)
        pixels = 0.0
        for stage in self._stages:
            steps = stage.end_step - max(step, stage.start_step)
            pixels += max(0, steps) * stage.batch_size * stage.image_size**2
        return pixels / (rate * current.image_size**2)

    def close(self) -> None:
        """Ends the live line and closes the files."""
        self._terminal.end()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _stage(self, step: int) -> Any:
        """The stage that the `step`-th step belongs to; of its two ends the start is exclusive."""
        for stage in self._stages:
            if step <= stage.end_step:
                return stage
        return self._stages[-1]

    def _record(self, split: str, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        stage = self._stage(step)
        record = {
            "step": int(step),
            "epoch": round(self.epoch(step), 4),
            "stage": stage.index,
            "image_size": stage.image_size,
            "split": split,
            **values,
        }
        if not self._active or (split, step) in self._known:
            return record
        self._file.write(encode(record))
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(f"{split}/{key}", value, step)
            self._events.add_scalar("progress/image_size", stage.image_size, step)
        return record

    def _progress(self, step: int) -> str:
        stage, last = self._stage(step), self._stages[-1].end_step
        parts = [
            f"stage {stage.index + 1}/{len(self._stages)} {stage.image_size} px",
            f"step {step}/{last}",
            f"epoch {self.epoch(step):.1f}/{self.epoch(last):.0f}",
        ]
        parts += [
            f"{key} {_show(key, self._latest[key])}"
            for key in ("loss", "top1", "learning_rate")
            if key in self._latest
        ]
        rate, eta = self._clock.lifetime_rate(), self.eta_seconds(step)
        if rate is not None:
            parts.append(f"{rate:,.0f} images/s")
        if eta is not None:
            parts.append(f"ETA {duration(eta)}")
        return "  ".join(parts)


def encode(record: Mapping[str, Any]) -> bytes:
    """Returns one line of valid JSON. NaN and infinities, which JSON has not, become null."""
    lost = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    clean = {k: None if k in lost else v for k, v in record.items()}
    if lost:
        clean["nonfinite"] = lost
    return (json.dumps(clean, allow_nan=False) + "\n").encode()


def repair(path: Path, *, last_step: int) -> list[dict[str, Any]]:
    """Removes from metrics.jsonl half-written lines and records later than `last_step`.

    Returns:
        The records that stay. The file is replaced only if something goes.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    kept, lines = [], []
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            keep = line.endswith(b"\n") and record["step"] <= last_step
        except (ValueError, TypeError, KeyError):  # cut off when the process was killed
            keep = False
        if keep:
            kept.append(record)
            lines.append(line)
    if b"".join(lines) != content:
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(lines))
    return kept


def duration(seconds: float) -> str:
    """Returns "42s", "3m05s", "2h07m" or "3d04h"."""
    total = int(seconds + 0.5)
    for size, name, part, part_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if total >= size:
            return f"{total // size}{name}{total % size // part:02d}{part_name}"
    return f"{total}s"


def _show(key: str, value: float) -> str:
    if "top1" in key or "top5" in key:
        return f"{100 * value:.2f}%"
    return f"{value:.3g}" if "rate" in key else f"{value:.4f}"


class _Clock:
    """Images per second of the time that counts."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._images = self._wait = self._seconds = 0.0
        self._all_images = self._all_seconds = 0.0
        self._since: float | None = time.monotonic()

    def stop(self) -> None:
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def count(self, images: int, wait: float) -> None:
        self._images += images
        self._wait += wait

    def read(self) -> tuple[float | None, float]:
        """Images/s and the share of the time spent waiting for data, since the last read."""
        self.stop()
        self.start()
        images, seconds, wait = self._images, self._seconds, self._wait
        self._all_images += images
        self._all_seconds += seconds
        self._images = self._wait = self._seconds = 0.0
        if not images or not seconds:
            return None, 0.0
        return images / seconds, min(1.0, wait / seconds)

    def lifetime_rate(self) -> float | None:
        """Images/s since the stage began."""
        now = 0.0 if self._since is None else time.monotonic() - self._since
        seconds = self._all_seconds + self._seconds + now
        images = self._all_images + self._images
        return images / seconds if images and seconds else None


class _Terminal:
    """Lines that stay, and below them, if somebody watches, one that is rewritten."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.live = stream.isatty()
        self._shown = ""
        self._next = 0.0

    def line(self, text: str) -> None:
        erase = "\r\x1b[2K" if self._shown else ""
        self._stream.write(f"{erase}{text}\n{self._shown}")
        self._stream.flush()

    def update(self, text: Any) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _REFRESH_SECONDS
        width = shutil.get_terminal_size().columns
        self._shown = text()[: max(1, width - 1)]  # a wrapped line could not be erased
        self._stream.write(f"\r\x1b[2K{self._shown}")
        self._stream.flush()

    def end(self) -> None:
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
            self._shown = ""


def _is_writer() -> bool:
    import jax  # not at the top: tools read a workdir's files without starting JAX

    return jax.process_index() == 0
