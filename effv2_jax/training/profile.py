"""Traces a few steps of each stage for a profiler to show (runtime.profile)."""

from pathlib import Path

import jax

from effv2_jax.training.progressive import Stage

_FIRST = 5  # steps of a stage before the trace: the first ones fill queues and caches
_STEPS = 3


class StageTrace:
    """Traces steps 6 to 8 of a stage, counted from where it starts in this process.

    Args:
        folder: traces go to folder/stage_N; "": no trace.
        stage: the stage.
        start_step: the first step that runs.
    """

    def __init__(self, folder: str, stage: Stage, *, start_step: int) -> None:
        self._folder = Path(folder) / f"stage_{stage.index + 1}" if folder else None
        self._first = min(start_step + _FIRST, max(start_step, stage.end_step - _STEPS))
        self._running = False

    def before_step(self, step: int) -> None:
        """Starts the trace if `step` finished steps are the right moment."""
        if self._folder is not None and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after_step(self, step: int, result: object) -> None:
        """Ends the trace once its steps are done; waits for their result."""
        if self._running and step >= self._first + _STEPS:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends the trace if it runs."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
