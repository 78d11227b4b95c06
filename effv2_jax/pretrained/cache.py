"""The user's cache of released weights, converted. Imports no JAX.

CACHE/efficientnetv2-s/imagenet1k.safetensors, with its SHA-256 in a file of the same name and
.sha256 (as `sha256sum --check` reads it) and a lock. CACHE is $XDG_CACHE_HOME/effv2_jax/weights,
~/.cache where that is not set. The folder may be copied to another machine.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from effv2_jax.atomic import replacing
from effv2_jax.errors import UserError
from effv2_jax.pretrained.released import Released

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


def cache_folder(folder: str | Path | None = None) -> Path:
    """Returns the folder of the cache: the one given, else the user's."""
    if folder is not None:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "effv2_jax/weights"


def weights_path(folder: Path, row: Released) -> Path:
    """Returns where the converted weights lie, or will."""
    return folder / row.model / f"{row.weights}.safetensors"


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(path: Path) -> None:
    """Notes the SHA-256 of a file beside it."""
    with replacing(_record(path)) as temporary:
        temporary.write_text(f"{sha256(path)}  {path.name}\n")


def is_intact(path: Path) -> bool:
    """Whether the file is there, with the bytes that it had when it was written.

    Raises:
        UserError: it is there, but cannot be read.
    """
    try:
        recorded = _record(path).read_text().split()
        return bool(recorded) and path.is_file() and sha256(path) == recorded[0]
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Makes the folder of a file of the cache and holds its lock; waits for whoever has it.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f"{path.name}.lock"), "a")  # noqa: SIM115 closed below
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written to ({error.strerror or error}), and has no whole "
            f"{path.name}: choose another folder with XDG_CACHE_HOME, or fill this one from an "
            "account that may write to it: python -m effv2_jax.pretrained NAME:WEIGHTS"
        ) from None
    with file:
        _wait_for(file.fileno(), path)
        yield


def _wait_for(handle: int, path: Path) -> None:
    if fcntl is None:
        return
    # Some network file systems have no locks: two processes may then both fetch the file, and
    # the one that is done last replaces it by an equal one.
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.name}: waiting for another process that fetches it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
