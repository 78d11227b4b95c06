"""What a person sees of a run: lines that stay, and one below them that is rewritten."""

import shutil
import time
from collections.abc import Callable
from typing import TextIO

_REFRESH_SECONDS = 0.1  # of the live line: fast enough for the eye, no load for the terminal
_ERASE = "\r\x1b[2K"


class Terminal:
    """Writes to a stream; the live line exists only where somebody watches.

    Attributes:
        live: whether the stream is a terminal, which can rewrite a line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.live = stream.isatty()
        self._shown = ""
        self._next = 0.0

    def line(self, text: str) -> None:
        """Prints a line that stays, above the live one."""
        self._write(f"{_ERASE}{text}\n{self._shown}" if self._shown else f"{text}\n")

    def update(self, text: Callable[[], str]) -> None:
        """Rewrites the live line, at most ten times a second; `text` is called only then."""
        now = time.monotonic()
        if not self.live or now < self._next:
            return
        self._next = now + _REFRESH_SECONDS
        # One column less than there are: a line that wraps could not be erased.
        self._shown = text()[: max(1, shutil.get_terminal_size().columns - 1)]
        self._write(f"{_ERASE}{self._shown}")

    def end(self) -> None:
        """Removes the live line."""
        if self._shown:
            self._write(_ERASE)
            self._shown = ""

    def bar(self, done: float, *, width: int = 12) -> str:
        """Returns a bar of which the share `done` (0 to 1) is filled."""
        filled = round(min(1.0, max(0.0, done)) * width)
        encoding = getattr(self._stream, "encoding", None) or "ascii"
        full, empty = ("█", "░") if encoding.lower().replace("-", "") == "utf8" else ("#", ".")
        return full * filled + empty * (width - filled)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """Returns "42s", "3m05s", "2h07m" or "3d04h"."""
    total = round(seconds)
    if total >= 86400:
        return f"{total // 86400}d{total % 86400 // 3600:02d}h"
    if total >= 3600:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    if total >= 60:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total}s"
