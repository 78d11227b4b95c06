"""Signals that ask a run to end: the step under way is finished and the state saved first."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes SIGTERM and SIGINT while the block lasts, instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once: somebody pressed Ctrl-C twice.

        with StopRequest() as stop:
            while not stop.requested: ...
        if stop.requested: raise SystemExit(128 + stop.signal)
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only; elsewhere the caller sees to them.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
