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
the methods compute what they return and do nothing else, so that the loop needs no conditions.

A line of metrics.jsonl, all rates and accuracies as shares of 1:
    {"step": 50, "epoch": 0.4, "stage": 0, "image_size": 128, "split": "train", "loss": 1.9,
     "top1": 0.31, "learning_rate": 0.02, "images_per_second": 812.0, "data_wait": 0.03}
loss and top1 are means over the steps since the line before.
data_wait is the share of the time in which the device had no batch to work on. Lines of "split":
"eval" have loss, top1, top5 of the raw weights and ema_loss, ema_top1, ema_top5.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from effv2_jax.atomic import replacing
from effv2_jax.training.progressive import Stage
from effv2_jax.training.terminal import Terminal, duration


class MetricsLogger:
    """Writes and prints what the run measures.

    Args:
        folder: the workdir.
        stages: of the whole run: for epoch, image size, batch size and ETA.
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
        stages: Sequence[Stage],
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
        self._terminal = Terminal(sys.stdout if stream is None else stream)
        self._latest: dict[str, float] = {}
        self._known: set[tuple[str, int]] = set()
        self._file = self._events = None
        self._torn = False
        if not self._active:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = repair(folder / "metrics.jsonl", last_step=resume_step)
        self._known = {(r.get("split", ""), r["step"]) for r in kept if r["step"] == resume_step}
        # Unbuffered: a line is one write, in the file at once, whatever happens to the process.
        self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
        if tensorboard:
            from tensorboardX import SummaryWriter  # here: it takes a second to import

            # TensorBoard hides what earlier event files have from this step on.
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._active:
            self._terminal.line(text)

    def begin_stage(self, stage: Stage, strengths: Mapping[str, str] | None = None) -> None:
        """Announces a stage and starts its clock: call when its program is compiled.

        Args:
            stage: that begins.
            strengths: its regularisation as text (`plan.strengths`); None is not told.
        """
        self._clock = _Clock()
        self._latest = {}
        told = "".join(
            f"{name} {value}, " for name, value in (strengths or {}).items() if value != "-"
        )
        self.say(
            f"stage {stage.index + 1}/{len(self._stages)}: {stage.image_size} px, batch "
            f"{stage.batch_size}, {told}steps {stage.start_step} to {stage.end_step}"
        )

    def step(self, step: int, *, data_wait: float = 0.0) -> None:
        """Counts a step whose work is handed to the device.

        Args:
            step: finished steps, this one included.
            data_wait: seconds the loop waited for its batch.
        """
        self._clock.count(self._stage(step).batch_size, data_wait)
        if self._active:
            self._terminal.update(lambda: self._progress(step))

    def train(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Records the metrics of the training step, with the throughput since the last record.

        Args:
            step: finished steps, the measured one included.
            metrics: scalars; arrays on the device are fetched, which waits for the step.

        Returns:
            The record.
        """
        self._latest = {key: float(value) for key, value in metrics.items()}
        self._latest |= self._clock.read()
        record = self._record("train", step, self._latest)
        if self._active and not self._terminal.live:
            self._terminal.line(self._progress(step))
        return record

    def evaluation(
        self, step: int, metrics: Mapping[str, Any], *, split: str = "eval"
    ) -> dict[str, Any]:
        """Records and prints the metrics of an evaluation.

        Args:
            step: finished steps.
            metrics: scalars: loss, top1, top5, ema_loss, ema_top1, ema_top5.
            split: what was evaluated.

        Returns:
            The record.
        """
        values = {key: float(value) for key, value in metrics.items()}
        record = self._record(split, step, values)
        shown = ", ".join(_show(key, value) for key, value in values.items())
        self.say(f"{split} at step {step}, epoch {record['epoch']:.1f}: {shown}")
        return record

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block (evaluation, compiling, saving) does not count in images/s.

        Wait for the device before: steps still queued would run in unmeasured time.
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
        """Seconds to the end of the run; None before the first step of the stage.

        Taken to be proportional to the pixels still to come, because later stages have larger
        images; with the share that went to evaluation so far.
        """
        rate = self._clock.rate()
        if rate is None:
            return None
        pixels = 0.0
        for stage in self._stages:
            steps = stage.end_step - max(step, stage.start_step)
            pixels += max(0, steps) * stage.batch_size * stage.image_size**2
        return self._clock.overhead() * pixels / (rate * self._stage(step).image_size ** 2)

    def close(self) -> None:
        """Ends the live line and closes the files."""
        self._terminal.end()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _stage(self, step: int) -> Stage:
        """The stage of the last finished step: a stage's end belongs to it, its start does not."""
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
        if self._active and (split, step) not in self._known:
            self._append(encode(record))
            if self._events is not None:
                for key, value in {**values, "image_size": stage.image_size}.items():
                    self._events.add_scalar(f"{split}/{key}", value, step)
        return record

    def _append(self, line: bytes) -> None:
        """Writes the line; a full disk costs records, not the run."""
        line = b"\n" + line if self._torn else line
        try:
            written, reason = self._file.write(line), "disk full"
        except OSError as error:
            written, reason = 0, error.strerror
        if written < len(line) and not self._torn:
            self.say(f"metrics.jsonl cannot be written ({reason}); the run goes on")
        self._torn = written < len(line)

    def _progress(self, step: int) -> str:
        stage, last = self._stage(step), self._stages[-1].end_step
        # The most wanted first: the live line is cut at the width of the terminal.
        parts = [f"stage {stage.index + 1}/{len(self._stages)} {stage.image_size} px"]
        if self._terminal.live:
            parts.append(self._terminal.bar(step / last))
        parts.append(f"step {step}/{last}")
        rate = self._latest.get("images_per_second") or self._clock.rate()
        eta = self.eta_seconds(step)
        if rate is not None:
            parts.append(f"{rate:.4g} images/s")
        if eta is not None:
            parts.append(f"ETA {duration(eta)}")
        parts += [_show(key, self._latest[key]) for key in ("loss", "top1") if key in self._latest]
        parts.append(f"epoch {self.epoch(step):.1f}/{self.epoch(last):.0f}")
        if "learning_rate" in self._latest:
            parts.append(_show("learning_rate", self._latest["learning_rate"]))
        return "  ".join(parts)


def encode(record: Mapping[str, Any]) -> bytes:
    """Returns one line of JSON. NaN and infinity, which JSON has not, become null and are named."""
    lost = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    clean = {key: None if key in lost else value for key, value in record.items()}
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


class _Clock:
    """Images per second of the time that counts, since the last reading and since the start."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._since: float | None = self._begin
        self._images = self._wait = self._seconds = 0.0
        self._read_images = self._read_seconds = 0.0

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

    def read(self) -> dict[str, float]:
        """Returns images_per_second and data_wait since the last reading; nothing without steps."""
        self._pass()
        images = self._images - self._read_images
        seconds = self._seconds - self._read_seconds
        wait = self._wait
        self._read_images, self._read_seconds, self._wait = self._images, self._seconds, 0.0
        if not images or not seconds:
            return {}
        return {"images_per_second": images / seconds, "data_wait": min(1.0, wait / seconds)}

    def rate(self) -> float | None:
        """Images per second since the start."""
        self._pass()
        return self._images / self._seconds if self._images and self._seconds else None

    def overhead(self) -> float:
        """All time since the start / the time that counts: 1 if there was no pause."""
        self._pass()
        return (time.monotonic() - self._begin) / self._seconds if self._seconds else 1.0

    def _pass(self) -> None:
        if self._since is not None:
            self.stop()
            self.start()


def _show(key: str, value: float) -> str:
    name = "lr" if key == "learning_rate" else key
    if "top1" in key or "top5" in key:
        return f"{name} {100 * value:.2f}%"
    return f"{name} {value:.3g}" if key == "learning_rate" else f"{name} {value:.4f}"


def _is_writer() -> bool:
    import jax  # not at the top: tools read a workdir's files without starting JAX

    return jax.process_index() == 0
