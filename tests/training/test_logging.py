"""metrics.jsonl without gaps, repeats or broken lines; events; what the terminal shows."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from effv2_jax.training import logging as run_logging
from effv2_jax.training.logging import MetricsLogger, encode, repair
from effv2_jax.training.progressive import Stage
from effv2_jax.training.terminal import Terminal, duration

ROOT = Path(__file__).resolve().parents[2]


def make_stage(index: int, image_size: int, start: int, end: int, *, batch: int = 8) -> Stage:
    return Stage(
        index=index,
        image_size=image_size,
        batch_size=batch,
        start_step=start,
        end_step=end,
        first_example=start * 8,
        epochs=(end - start) * batch / 80,
        magnitude=5.0,
        dropout_rate=0.1,
        mixup_alpha=0.0,
        cutmix_alpha=0.0,
        schedule_start=float(start),
        schedule_scale=1.0,
        lr_scale=1.0,
    )


STAGES = (make_stage(0, 16, 0, 20), make_stage(1, 32, 20, 40, batch=16))


def open_logger(folder: Path, **options) -> MetricsLogger:
    options = {"num_examples": 80, "tensorboard": False, "stream": io.StringIO(), **options}
    return MetricsLogger(folder, STAGES, **options)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    fake = Clock()
    monkeypatch.setattr(run_logging, "time", fake)
    return fake


def test_records_have_the_documented_keys_and_values(tmp_path, clock):
    with open_logger(tmp_path) as logger:
        logger.begin_stage(STAGES[0])
        for step in range(1, 6):
            clock.now += 0.5
            logger.step(step, data_wait=0.1)
        logger.train(5, {"loss": jnp.float32(1.5), "top1": 0.25, "learning_rate": 0.125})
        logger.evaluation(30, {"loss": 1.25, "top1": 0.5, "top5": 1.0, "ema_top1": 0.75})
    assert lines(tmp_path) == [
        {
            "step": 5,
            "epoch": 0.5,
            "stage": 0,
            "image_size": 16,
            "split": "train",
            "loss": 1.5,
            "top1": 0.25,
            "learning_rate": 0.125,
            "images_per_second": pytest.approx(16),
            "data_wait": pytest.approx(0.2),
        },
        {
            "step": 30,
            "epoch": 4.0,  # (20 * 8 + 10 * 16) / 80
            "stage": 1,
            "image_size": 32,
            "split": "eval",
            "loss": 1.25,
            "top1": 0.5,
            "top5": 1.0,
            "ema_top1": 0.75,
        },
    ]


def test_images_per_second_exclude_what_is_paused(tmp_path, clock):
    with open_logger(tmp_path) as logger:
        logger.begin_stage(STAGES[0])
        for step in (1, 2):
            clock.now += 1
            logger.step(step)
        with logger.paused():
            clock.now += 1000
        for step in (3, 4):
            clock.now += 1
            logger.step(step)
        assert logger.train(4, {})["images_per_second"] == pytest.approx(8)
        clock.now += 4
        logger.step(5)
        assert logger.train(5, {})["images_per_second"] == pytest.approx(2)
        assert "images_per_second" not in logger.train(5, {})  # no step since


def test_eta_counts_the_pixels_of_later_stages_and_the_share_of_evaluation(tmp_path, clock):
    with open_logger(tmp_path) as logger:
        assert logger.eta_seconds(0) is None
        logger.begin_stage(STAGES[0])
        for step in range(1, 11):
            clock.now += 1
            logger.step(step)
        # 10 more steps as these; then 20 of twice the batch at four times the pixels.
        assert logger.eta_seconds(10) == pytest.approx(10 + 20 * 2 * 4)
        with logger.paused():
            clock.now += 5
        assert logger.eta_seconds(10) == pytest.approx(1.5 * (10 + 20 * 2 * 4))


def test_not_finite_values_are_valid_json_and_named(tmp_path):
    with open_logger(tmp_path) as logger:
        logger.train(1, {"loss": float("nan"), "grad_norm": float("inf"), "top1": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert record["nonfinite"] == ["loss", "grad_norm"]
    assert record["top1"] == 0.5


def test_resumed_file_has_every_step_once(tmp_path):
    with open_logger(tmp_path) as logger:
        for step in (5, 10, 15):
            logger.train(step, {"loss": float(step)})
        logger.evaluation(10, {"top1": 0.1})
    with open_logger(tmp_path, resume_step=10) as logger:
        logger.evaluation(10, {"top1": 0.1})  # an evaluation done again
        for step in (15, 20):
            logger.train(step, {"loss": float(step)})
    found = [(record["split"], record["step"]) for record in lines(tmp_path)]
    assert found == [("train", 5), ("train", 10), ("eval", 10), ("train", 15), ("train", 20)]


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 3, "lo', b'{"step": 3}', b"\x00\x00\x00\n", b"[1]\n", b'{"loss": 1}\n', b"\n"],
)
def test_half_written_or_foreign_lines_are_removed(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    good = encode({"step": 1}) + encode({"step": 2})
    path.write_bytes(good + tail)
    assert [record["step"] for record in repair(path, last_step=10)] == [1, 2]
    assert path.read_bytes() == good


def test_whole_file_is_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode({"step": 1}))
    before = path.stat()
    repair(path, last_step=1)
    assert path.stat().st_ino == before.st_ino


def test_file_of_a_process_killed_while_writing_continues(tmp_path):
    script = """
        import sys
        from tests.training.test_logging import open_logger
        with open_logger(sys.argv[1]) as logger:
            for step in range(10**9):
                logger.train(step, {f"metric_{i}": step / 3 for i in range(50)})
                print(step, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while int(process.stdout.readline()) < 20:
        pass
    process.send_signal(signal.SIGKILL)
    told = [int(line) for line in process.stdout.read().split()]
    process.wait()
    process.stdout.close()
    with open_logger(tmp_path, resume_step=10**9) as logger:
        logger.train(10**9 + 1, {"loss": 1.0})
    steps = [record["step"] for record in lines(tmp_path)]
    assert steps[:-1] == list(range(len(steps) - 1))
    assert len(steps) - 1 >= max(told, default=20) + 1  # what was written before a print is there
    assert steps[-1] == 10**9 + 1


def test_full_disk_costs_records_and_not_the_run(tmp_path):
    stream = io.StringIO()
    with open_logger(tmp_path, stream=stream) as logger:
        logger.train(1, {"loss": 1.0})
        real, logger._file = logger._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        logger.train(2, {"loss": 1.0})
        logger.train(3, {"loss": 1.0})
        logger._file.close()
        logger._file = real
        logger.train(4, {"loss": 1.0})
    assert stream.getvalue().count("metrics.jsonl cannot be written (No space left") == 1
    assert [record["step"] for record in repair(tmp_path / "metrics.jsonl", last_step=9)] == [1, 4]


def read_events(folder: Path) -> list[event_pb2.Event]:
    events = []
    for path in sorted(folder.glob("events.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):  # TFRecord: length u64, its crc u32, bytes, their crc u32
            size = int.from_bytes(content[at : at + 8], "little")
            events.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return events


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    with open_logger(tmp_path, tensorboard=True) as logger:
        logger.train(5, {"loss": 1.5, "learning_rate": 0.125})
        logger.evaluation(10, {"ema_top1": 0.75})
    found = {
        (value.tag, event.step): value.simple_value
        for event in read_events(tmp_path / "tensorboard")
        for value in event.summary.value
    }
    assert found == {
        ("train/loss", 5): 1.5,
        ("train/learning_rate", 5): 0.125,
        ("train/image_size", 5): 16,
        ("eval/ema_top1", 10): 0.75,
        ("eval/image_size", 10): 16,
    }


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path):
    with open_logger(tmp_path, tensorboard=True) as logger:
        logger.train(15, {"loss": 1.5})
    time.sleep(1.1)  # the names of event files have seconds
    with open_logger(tmp_path, tensorboard=True, resume_step=10) as logger:
        logger.train(15, {"loss": 1.5})
    starts = [
        event.step
        for event in read_events(tmp_path / "tensorboard")
        if event.session_log.status == event.session_log.START
    ]
    assert starts[-1] == 11


def run_a_little(logger: MetricsLogger) -> None:
    logger.begin_stage(STAGES[1], {"magnitude": "-", "dropout": "0.1", "mixup": "0"})
    for step in range(21, 25):
        logger.step(step)
        time.sleep(0.11)
    logger.train(24, {"loss": 1.5, "top1": 0.123, "learning_rate": 0.0625})
    logger.step(25)
    logger.evaluation(25, {"loss": 1.25, "top1": 0.5})
    logger.close()


def test_plain_lines_where_nobody_watches(tmp_path):
    stream = io.StringIO()
    run_a_little(open_logger(tmp_path, stream=stream))
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    stage, train, evaluation = text.splitlines()
    assert stage == "stage 2/2: 32 px, batch 16, dropout 0.1, mixup 0, steps 20 to 40"
    for part in ("stage 2/2 32 px", "step 24/40", "images/s", "ETA", "loss 1.5000", "top1 12.30%"):
        assert part in train
    assert evaluation == "eval at step 25, epoch 3.0: loss 1.2500, top1 50.00%"


def test_terminal_shows_one_live_line_and_lines_that_stay(tmp_path):
    primary, secondary = pty.openpty()
    with os.fdopen(secondary, "w", encoding="utf-8") as stream:
        run_a_little(open_logger(tmp_path, stream=stream))
    chunks = []
    with contextlib.suppress(OSError):  # the end of what was written
        while chunk := os.read(primary, 4096):
            chunks.append(chunk)
    os.close(primary)
    written = b"".join(chunks).decode().replace("\r\n", "\n")
    live = [part for part in written.split("\r\x1b[2K")[1:] if "\n" not in part]
    assert len(live) >= 3
    assert all(len(part) < 80 for part in live)
    assert "█" in live[0]
    assert "images/s" in live[0]
    # What remains on the screen after each erasure:
    screen = [line.split("\r\x1b[2K")[-1] for line in written.split("\n")]
    assert [line.split(":")[0] for line in screen] == [
        "stage 2/2",
        "eval at step 25, epoch 3.0",
        "",
    ]


def test_other_processes_write_and_print_nothing(tmp_path):
    stream = io.StringIO()
    logger = open_logger(tmp_path / "none", stream=stream, active=False, tensorboard=True)
    with logger.paused():
        pass
    run_a_little(logger)
    assert logger.train(30, {"loss": 2.0})["loss"] == 2.0
    assert stream.getvalue() == ""
    assert not (tmp_path / "none").exists()


def test_bar_is_ascii_where_the_terminal_is():
    class Ascii(io.StringIO):
        encoding = "ascii"

    class Utf8(io.StringIO):
        encoding = "UTF-8"

    assert Terminal(Ascii()).bar(0.5, width=4) == "##.."
    assert Terminal(Utf8()).bar(1.5, width=4) == "████"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3725, "1h02m"), (90000, "1d01h")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
