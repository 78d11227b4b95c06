"""What all commands share: their parser, their exit codes, and how they write results."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from effv2_jax.atomic import replacing
from effv2_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and raises UserError where argparse prints its usage."""

    def __init__(self, description: str, epilog: str = "", *, prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Refuses the command line."""
        raise UserError(f"{message}; --help shows the flags")


def positive(text: str) -> int:
    """The type of a flag that is a number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1 on")
    return int(text)


def exit_code(command: Callable[..., None], *arguments: Any) -> int:
    """Runs a command and returns its exit code.

    Returns:
        0 done; 2 the input is wrong (one line on standard error, no traceback); 130 interrupted.
    """
    try:
        command(*arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # as shells have it
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def say(text: str) -> None:
    """Tells the user something on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def write_text(text: str, path: str | None) -> None:
    """Writes to a file, which is complete or as it was, or to standard output.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        # Names on a disk may have bytes that are no text.
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text)
        return
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path whose file takes the place of `path` at the end.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_output(flag: str, path: str | None, *, endings: tuple[str, ...] = ()) -> None:
    """Refuses a file that could not be written in the end, before any work is done.

    Args:
        flag: that named it.
        path: the file, or None.
        endings: of its name, one of which is needed; (): any.
    """
    if path is None:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not folder.is_dir():
        found = "is a folder" if Path(path).is_dir() else f"there is no folder {folder}"
        raise UserError(f"{flag} {path}: {found}; expected the name of a file to write")
    _check_writable(flag, path, folder)
    if endings and not path.lower().endswith(endings):
        raise UserError(f"{flag} {path}: expected a name ending in {', '.join(endings)}")


def check_folder(flag: str, path: str | None) -> None:
    """Refuses a folder that could not be made or written to, before any work is done.

    Args:
        flag: that named it.
        path: the folder, which need not be there, or None.
    """
    if path is None:
        return
    folder = Path(path).absolute()
    nearest = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not nearest.is_dir():
        raise UserError(f"{flag} {path}: {nearest} is no folder; expected the name of one")
    _check_writable(flag, path, nearest)


def _check_writable(flag: str, path: str, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {folder} cannot be written to; choose another folder")
