"""Writing files so that nothing good is overwritten before the new is complete."""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; it takes the place of `path` at the end.

    The bytes are on the disk before the name points to them, so that not even a power cut leaves a
    half-written file under the name. If the block fails or is interrupted, the temporary file is
    removed and `path` stays as it was.

        with replacing("model.bin") as temporary:
            temporary.write_bytes(content)
    """
    path = Path(path)
    # A name of its own per writer: two that write the same file at once do not mix their bytes.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # who wrote it may have replaced it by one that others cannot read
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_to_disk(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON; the file is at any moment either the old or the new one, complete."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
