"""How far a command has come, where somebody watches."""

import sys
import time

_SECONDS = 0.5  # between two updates
_ERASE = "\r\x1b[2K"


class Progress:
    """One line on standard error that counts; nothing where that is no terminal.

    Args:
        total: pictures there are.
    """

    def __init__(self, total: int) -> None:
        self._total, self._next = total, 0.0
        self._watched = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Rewrites the line, not too often."""
        if self._watched and time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS
            sys.stderr.write(f"{_ERASE}{done:,} of {self._total:,} pictures")
            sys.stderr.flush()

    def line(self, text: str) -> None:
        """Says something that stays."""
        sys.stderr.write(f"{_ERASE if self._watched else ''}{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Removes the line."""
        if self._watched:
            sys.stderr.write(_ERASE)
            sys.stderr.flush()
