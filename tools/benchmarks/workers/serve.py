"""How a worker talks: one JSON object a line on standard input, one answer a line on its output.

    {"do": "prepare", ...the task...}  -> what `prepare` says: settings, versions, compile_seconds
    {"do": "run", "steps": 3}          -> {"wall": seconds, "processor": seconds}
    {"do": "profile", "steps": 3}      -> see kernels.py; only effv2_worker.py answers
    {"do": "memory"}                   -> {"resident_bytes": ..., "device_bytes": ...}
    {"do": "step memory"}              -> {"step_bytes": ...}
    {"do": "quit"}

A task that cannot be done is answered with {"refused": why}, a failure with {"failed": what}. Only
the standard library is imported here: this file runs in other frameworks' environments too.
"""

import ctypes
import dataclasses
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

_TRIAL_SECONDS = 1.0  # measured of each candidate


class RefusedError(Exception):
    """The task cannot be done by this framework, with these devices or on this machine."""


@dataclasses.dataclass(kw_only=True)
class Prepared:
    """A step that is ready.

    Attributes:
        run: makes so many steps and waits for the last one's result; may return the seconds they
            took, where not everything it did is to be counted.
        facts: for the record, JSON values.
        device_bytes: peak memory of the accelerator since it was last asked; None where there is
            none or it does not say.
        profile: makes so many steps and says what they were spent on.
    """

    run: Callable[[int], float | None]
    facts: dict[str, Any]
    device_bytes: Callable[[], int | None] = lambda: None
    profile: Callable[[int], dict[str, Any]] | None = None


def serve(
    prepare: Callable[[Mapping[str, Any]], Prepared], *, refusals: tuple[type[Exception], ...] = ()
) -> None:
    """Answers until told to quit or left alone.

    Args:
        prepare: makes what is measured, from the task.
        refusals: exceptions that say what the user asked wrongly, beside `RefusedError`.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a framework prints must not come between the answers
    before = _resident("VmRSS")
    prepared = None
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "quit":
            return
        try:
            if message["do"] == "prepare":
                prepared = prepare(message)
                answer = prepared.facts
                _forget_peak()
            elif message["do"] == "run":
                answer = _run(prepared, message["steps"])
            elif message["do"] == "profile":
                answer = prepared.profile(message["steps"])
            elif message["do"] == "step memory":
                answer = {"step_bytes": _step_bytes(prepared)}
            else:
                peak = _resident("VmHWM")
                answer = {
                    "resident_bytes": None if peak is None else peak - before,
                    "device_bytes": prepared.device_bytes(),
                }
        except (RefusedError, *refusals) as error:
            answer = {"refused": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")


def _trial(run: Callable[[int], None]) -> float:
    """Seconds of a step, the best of a few."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < _TRIAL_SECONDS:
        start = time.perf_counter()
        run(1)
        times.append(time.perf_counter() - start)
    return min(times)


def fastest(
    candidates: Mapping[str, Callable[[], Callable[[int], Any]]],
    only: str | None,
    *,
    trial: Callable[[Callable[[int], Any]], float] = _trial,
) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """Tries ways of computing the same step and keeps the fastest.

    Args:
        candidates: name -> makes the way's `run(steps)`.
        only: the name of the one to take without trying; None: try all.
        trial: measures a way: seconds of a step.

    Returns:
        The run, and the facts: "candidate" its name, "compile_seconds" from nothing to its first
        result, "tried" what each made of it: ms a step, or why it failed.

    Raises:
        RefusedError: none works.
    """
    tried: dict[str, str] = {}
    best = None
    for name, make in candidates.items():
        if only not in (None, name):
            continue
        try:
            start = time.perf_counter()
            run = make()
            run(1)
            first = time.perf_counter() - start
            seconds = trial(run) if only is None and len(candidates) > 1 else 0.0
        except Exception as error:
            tried[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        tried[name] = f"{1e3 * seconds:.1f} ms"
        if best is None or seconds < best[0]:
            best = seconds, run, {"candidate": name, "compile_seconds": first}
    if best is None:
        raise RefusedError(f"nothing works: {tried}")
    return best[1], {**best[2], "tried": tried}


def _run(prepared: Prepared, steps: int) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    seconds = prepared.run(steps)
    if seconds is None:
        seconds = time.perf_counter() - wall
    return {
        "wall": seconds / steps,
        "processor": (time.process_time() - processor) / steps,
    }


def _step_bytes(prepared: Prepared) -> int | None:
    """By how much a step lets this process grow over what stays between two steps.

    Parameters stay, compiled programs and whatever a framework keeps for itself; activations,
    gradients and what the step computes with come and go. Freed memory that the allocator keeps is
    given back before.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "mallctl"):
        library.mallctl(b"arena.4096.purge", None, None, None, 0)  # MALLCTL_ARENAS_ALL
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    between = _resident("VmRSS")
    _forget_peak()
    prepared.run(1)
    return None if between is None else _resident("VmHWM") - between


def _resident(key: str) -> int | None:
    """Bytes of this process in memory: VmRSS now, VmHWM at most. None where Linux does not run."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return None


def _forget_peak() -> None:
    """Lets VmHWM start anew, so that what compiling needed is not counted."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
