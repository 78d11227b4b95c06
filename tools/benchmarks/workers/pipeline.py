"""What the workers of input pipelines share. Only the standard library is imported here."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

_TRIAL_IMAGES = 1024

Run = Callable[[int], float]


def timed(start: Callable[[], Iterator[Any]], *, warm: int) -> Run:
    """Returns a run that starts a pipeline, times batches once it flows, and ends it.

    Whoever takes the batches is faster than the pipeline, so what lay ready at its start is gone
    when the clock starts. But processes that begin together finish together, and then several
    batches come at once: one alone may seem to take no time. So never fewer than twice `warm` are
    timed, and the time of `steps` follows in proportion.

    Args:
        start: starts the pipeline: an endless iterator, ended by its `close` or when it is dropped.
        warm: batches before the clock starts: more than may lie ready or come at once.
    """

    def run(steps: int) -> float:
        batches = start()
        for _ in itertools.islice(batches, warm):
            pass
        wanted = max(steps, 2 * warm)
        began = time.perf_counter()
        taken = sum(1 for _ in itertools.islice(batches, wanted))
        seconds = time.perf_counter() - began
        if taken < wanted:
            raise RuntimeError(f"the pipeline ended after {warm + taken} batches")
        if hasattr(batches, "close"):
            batches.close()
        return seconds * steps / taken

    return run


def trial(batch: int) -> Callable[[Run], float]:
    """Returns what measures a way on trial (`serve.fastest`): seconds of a batch."""
    steps = max(4, _TRIAL_IMAGES // batch)
    return lambda run: run(steps) / steps
