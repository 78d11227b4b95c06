"""Which pictures a command was asked about: files, folders, patterns, names on standard input."""

import glob
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from effv2_jax.command import Parser, positive
from effv2_jax.data.sources_folder import EXTENSIONS, find_images
from effv2_jax.errors import UserError

_STDIN = "-"
_LISTED = 8  # problems named before "and N more"

# How files begin that somebody may pipe in instead of their names.
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def add_picture_flags(parser: Parser) -> None:
    """Adds what every command over pictures takes."""
    add = parser.add_argument
    add("pictures", metavar="IMAGE", nargs="+",
        help="file, folder (all below it), pattern in quotes, or - for names on standard input, "
        "one a line")  # fmt: skip
    add("--image-size", type=positive, metavar="N", help="px; default: as the weights say")
    add("--batch-size", type=positive, default=32, metavar="N", help="default: 32")
    add("--on-corrupt", choices=("error", "skip"), default="error",
        help="files that are no pictures: name all and stop (default), or leave out")  # fmt: skip
    add("--no-tune", action="store_true", help="leave allocator and XLA flags as they are")


def find_pictures(arguments: Sequence[str], *, stdin: BinaryIO | None = None) -> list[str]:
    """Returns the paths of the pictures, each once, in the order of the arguments.

    A file is taken whatever its name; of a folder all that end like pictures, at any depth, and of
    a pattern (`*`, `?`, `[...]`, `**`) likewise; both in natural order: 2.jpg before 10.jpg.

    Args:
        arguments: files, folders, patterns; "-" reads files and folders from standard input, one
            name a line (or separated by NUL bytes, as `find -print0` does).
        stdin: instead of the process's.

    Raises:
        UserError: names nothing, or a folder or pattern without pictures; all are named together.
    """
    found: dict[str, None] = {}
    problems: list[str] = []
    for argument in arguments:
        names = [argument]
        if argument == _STDIN:
            names = _names(sys.stdin.buffer if stdin is None else stdin)
            if not names:
                problems.append("standard input: found no names, expected one a line")
        for name in names:
            try:
                found.update(dict.fromkeys(_expand(name, patterns=argument != _STDIN)))
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError(listed(problems))
    return list(found)


def listed(problems: Sequence[str]) -> str:
    """Returns the problems as one line, of many the first ones and how many more there are."""
    more = len(problems) - _LISTED
    return "; ".join(problems[:_LISTED]) + (f"; and {more:,} more like these" if more > 0 else "")


def natural_order(names: Iterable[str]) -> list[str]:
    """Returns the paths sorted folder by folder, numbers in them by value, case ignored."""

    def key(name: str) -> tuple:
        parts = [
            [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", part.casefold())]
            for part in name.split(os.sep)
        ]
        return parts, name

    return sorted(names, key=key)


def folder_name(path: str) -> str:
    """Returns the name of the folder that a picture lies in: its class, in a folder of classes."""
    return os.path.basename(os.path.dirname(os.path.abspath(path)))


def _expand(name: str, *, patterns: bool) -> list[str]:
    if os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        paths = [os.path.join(name, path) for path in find_images(name)]
        where = f"{name}: found no picture in this folder"
    elif patterns and glob.has_magic(name):
        paths = []
        for match in glob.glob(os.path.expanduser(name), recursive=True):
            if os.path.isdir(match):
                paths += [os.path.join(match, path) for path in find_images(match)]
            elif match.lower().endswith(EXTENSIONS):
                paths.append(match)
        where = f"{name}: found no picture that this pattern matches"
    else:
        raise UserError(f"{name or repr(name)}: no such file or folder")
    if not paths:
        raise UserError(f"{where}, expected files ending in {' '.join(EXTENSIONS)}")
    return natural_order(set(paths))  # "**" matches a folder and what lies in it


def _names(stdin: BinaryIO) -> list[str]:
    data = stdin.read()
    if data.startswith(_IMAGE_STARTS):
        raise UserError(
            "standard input: found a picture itself, expected names of pictures, one a line"
        )
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]
