"""Finds the files of a TensorFlow checkpoint: in a folder, by a prefix, or in an archive.

An archive is read as a stream: the index into memory, the tensors' bytes of a compressed one into a
temporary file without a name, nothing else. Nothing is unpacked under a name of the archive's.
"""

import dataclasses
import gzip
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from effv2_jax.errors import UserError

_SUFFIX = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
_MAX_INDEX = 1 << 28  # bytes; the index of the largest network has less than 1 MB
_BROKEN = (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
_OTHERS = {".h5": "convert_keras.py", ".keras": "convert_keras.py", ".pth": "convert_timm.py or "
           "convert_torchvision.py", ".safetensors": "convert_timm.py"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Extent:
    """A file, or a member of an uncompressed archive: bytes from `start` on in an open file.

    Attributes:
      name: for messages.
      file: open for reading.
      start: of the first byte in the file.
      size: bytes.
    """

    name: str
    file: IO[bytes]
    start: int
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` on; fewer where the extent ends."""
        self.file.seek(self.start + offset)
        size = max(min(size, self.size - offset), 0)
        found = self.file.read(size)
        if len(found) != size:
            raise UserError(f"{self.name}: ends while it is read; is it being written?")
        return found

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fills an array of bytes from `offset` on."""
        self.file.seek(self.start + offset)
        if array.size and self.file.readinto(array) != array.size:
            raise UserError(f"{self.name}: ends while it is read; is it being written?")


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """The parts of one checkpoint.

    Attributes:
      where: the checkpoint's prefix, or "ARCHIVE: PREFIX", for messages.
      index: content of the .index file.
      shard: (number, how many) -> the bytes of the shard.
      hashed: files whose SHA-256 identifies the checkpoint.
    """

    where: str
    index: bytes
    shard: Callable[[int, int], Extent]
    hashed: tuple[Path, ...]


def find(path: str | Path) -> CheckpointFiles:
    """Finds a checkpoint.

    Args:
        path: a folder (its file `checkpoint` says which one), a prefix ("model.ckpt-5"), one of the
            checkpoint's files, or an archive (.tgz, .tar.gz, .tar).

    Raises:
        UserError: there is none, or several and nothing says which one.
    """
    path = Path(path)
    if path.is_dir():
        return _from_prefix(_latest(path))
    if path.is_file() and not _SUFFIX.search(path.name):
        if path.suffix in _OTHERS:
            raise UserError(
                f"{path}: not a TensorFlow checkpoint; convert it with tools/{_OTHERS[path.suffix]}"
            )
        return _from_archive(path)
    return _from_prefix(path.with_name(_SUFFIX.sub("", path.name)))


def _latest(folder: Path) -> Path:
    """The prefix that a folder's `checkpoint` file names, or that of its only checkpoint."""
    present = sorted(p.name.removesuffix(".index") for p in folder.glob("*.index"))
    state = folder / "checkpoint"
    named = _named(state.read_bytes()) if state.is_file() else None
    return folder / _choose(str(folder), named, present)


def _named(state: bytes) -> str | None:
    """The prefix's last part in a `checkpoint` file: text with C escapes, often another machine's
    path.
    """
    found = re.search(rb'^model_checkpoint_path:\s*"((?:[^"\\]|\\.)*)"', state, re.MULTILINE)
    if found is None:
        return None

    def unescape(match: re.Match) -> bytes:
        text = match[1]
        return bytes([int(text, 8) & 0xFF]) if text.isdigit() else text

    text = re.sub(rb"\\([0-7]{3}|.)", unescape, found[1])
    return PurePosixPath(text.decode(errors="replace")).name


def _choose(where: str, named: str | None, present: list[str]) -> str:
    if named in present:
        return named
    if len(present) == 1:
        return present[0]
    if not present:
        raise UserError(f"{where}: no checkpoint in it: no file ends in .index")
    told = f"its file `checkpoint` names {named!r}, not one of them" if named else "none is named"
    raise UserError(f"{where}: several checkpoints, and {told}: give one of {', '.join(present)}")


def _from_prefix(prefix: Path) -> CheckpointFiles:
    index = Path(f"{prefix}.index")
    if not index.is_file():
        near = sorted(p.name.removesuffix(".index") for p in prefix.parent.glob("*.index"))
        there = f"; in {prefix.parent} there are: {', '.join(near)}" if near else ""
        raise UserError(
            f"{prefix}: no such checkpoint: expected {index.name}, a folder or an archive{there}"
        )

    def shard(i: int, count: int) -> Extent:
        path = Path(f"{prefix}.data-{i:05d}-of-{count:05d}")
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise UserError(
                f"{prefix}: incomplete: {path.name} is not beside {index.name}; copy or download "
                "it too"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        return Extent(path.name, file, 0, os.fstat(file.fileno()).st_size)

    try:
        if index.stat().st_size > _MAX_INDEX:
            raise UserError(f"{index}: {index.stat().st_size:,} bytes: not the index of a network")
        content = index.read_bytes()
    except OSError as error:
        raise UserError(f"{index}: cannot be read: {error.strerror or error}") from None
    shards = sorted(prefix.parent.glob(f"{_escaped(prefix.name)}.data-?????-of-?????"))
    return CheckpointFiles(str(prefix), content, shard, (index, *shards))


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _from_archive(path: Path) -> CheckpointFiles:
    try:
        with path.open("rb") as file:
            compressed = not _is_plain_tar(file)
        members = _read_archive(path, compressed=compressed)
    except _BROKEN as error:
        raise UserError(
            f"{path}: not a whole archive of a checkpoint ({error}); expected .tgz or .tar, or a "
            "checkpoint's prefix"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    present = sorted(n.removesuffix(".index") for n in members if n.endswith(".index"))
    states = [content for name, content in members.items()
              if PurePosixPath(name).name == "checkpoint"]  # fmt: skip
    named = _named(states[0].read(0, _MAX_INDEX)) if len(states) == 1 else None
    by_name = {PurePosixPath(prefix).name: prefix for prefix in present}
    prefix = by_name.get(named) or _choose(str(path), named, present)
    where = f"{path}: {prefix}"

    def shard(i: int, count: int) -> Extent:
        name = f"{prefix}.data-{i:05d}-of-{count:05d}"
        if name not in members:
            raise UserError(f"{path}: cut off or incomplete: {name} is not in it")
        return members[name]

    index = members[f"{prefix}.index"]
    return CheckpointFiles(where, index.read(0, index.size), shard, (path,))


def _is_plain_tar(file: IO[bytes]) -> bool:
    head = file.read(512)
    return head[257:262] == b"ustar"


def _read_archive(path: Path, *, compressed: bool) -> dict[str, Extent]:
    """The members that belong to checkpoints, by their names without "./".

    Raises:
        UserError: a member's name or kind would leave the folder that it is unpacked in.
    """
    members: dict[str, Extent] = {}
    archive_file = path.open("rb")
    with tarfile.open(fileobj=archive_file, mode="r|*" if compressed else "r:") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.isdir() and ".." not in parts and not member.name.startswith("/"):
                continue
            if member.name.startswith("/") or ".." in parts or not member.isreg():
                raise UserError(
                    f"{path}: {member.name!r} in it points out of the archive or is no plain file: "
                    "not an archive of a checkpoint"
                )
            name = str(PurePosixPath(member.name))
            small = name.endswith(".index") or parts[-1] == "checkpoint"
            if small and member.size > _MAX_INDEX:
                raise UserError(f"{path}: {name} in it has {member.size:,} bytes: not an index")
            if (not small and not _SUFFIX.search(name)) or name.endswith(".meta"):
                continue
            if compressed:
                members[name] = _copied(archive, member, name)
            else:
                members[name] = Extent(name, archive_file, member.offset_data, member.size)
    return members


def _copied(archive: Any, member: tarfile.TarInfo, name: str) -> Extent:
    """A compressed member, in a temporary file that has no name and vanishes with the process."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 open as long as the result
        with archive.extractfile(member) as source:
            shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise
        raise UserError(
            f"{name}: no space for {member.size:,} bytes in {tempfile.gettempdir()}: "
            f"{error.strerror or error}; set TMPDIR to another folder"
        ) from None
    return Extent(name, file, 0, member.size)
