"""Reads PyTorch's files (.pth, .pt, .bin) without PyTorch and without running what is in them.

Such a file is a pickle, and a pickle is a program: it may call any function by its name. Here the
names that the tensors of a state dict need are known, and mean our own harmless functions; any
other name ends the reading. What the pickle says about a tensor is checked against the bytes that
are there.

Two layouts, both written by `torch.save`: since PyTorch 1.6 a ZIP archive of one pickle and one
entry per storage (torch/serialization.py, _save), whose checksums are verified; before that the
pickle and after it the storages (_legacy_save), which have none.
"""

import contextlib
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from effv2_jax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# Within these first bytes is the magic number, as the pickle protocols from 2 on write it, or 0, 1.
_LEGACY_START = 32
_LEGACY_MARKS = (_LEGACY_MAGIC.to_bytes(10, "little"), str(_LEGACY_MAGIC).encode())
_RESAVE = (
    "nothing of it was run; save only the tensors, in PyTorch: "
    "torch.save(model.state_dict(), 'weights.pth')"
)

# torch.<name> -> how the bytes are read, and what the type is called; bfloat16 is the upper half
# of a float32 and NumPy has no name for it.
_STORAGES: dict[str, tuple[str, str]] = {
    "DoubleStorage": ("f8", "float64"),
    "FloatStorage": ("f4", "float32"),
    "HalfStorage": ("f2", "float16"),
    "BFloat16Storage": ("u2", "bfloat16"),
    "LongStorage": ("i8", "int64"),
    "IntStorage": ("i4", "int32"),
    "ShortStorage": ("i2", "int16"),
    "CharStorage": ("i1", "int8"),
    "ByteStorage": ("u1", "uint8"),
    "BoolStorage": ("?", "bool"),
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Numbers in a file, to which tensors refer."""

    key: str
    kind: str  # of _STORAGES
    size: int  # numbers


def _dtype(storage: _Storage) -> np.dtype:
    return np.dtype(_STORAGES[storage.kind][0]).newbyteorder("<")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file that has not been read yet.

    Attributes:
      dtype: as PyTorch writes it, e.g. "float32" or "bfloat16".
      shape: sizes.
    """

    dtype: str
    shape: tuple[int, ...]
    _strides: tuple[int, ...]
    _offset: int
    _storage: _Storage
    _load: Callable[[_Storage], np.ndarray]

    def read(self) -> np.ndarray:
        """Returns the numbers; bfloat16 as float32, which holds them exactly.

        Raises:
          UserError: the bytes are damaged, or fewer than the tensor needs.
        """
        flat = self._load(self._storage)
        strides = tuple(stride * flat.itemsize for stride in self._strides)
        tensor = np.lib.stride_tricks.as_strided(
            flat[self._offset :], self.shape, strides, writeable=False
        )
        if self.dtype == "bfloat16":
            return np.asarray(tensor.astype(np.uint32) << 16).view(np.float32)
        return np.array(tensor)


class _Inert:
    """Stands for an object of which nothing is wanted, such as the command line of a training."""

    def __init__(self, *_: Any) -> None: ...


class _Dict(dict):
    """An OrderedDict without the attributes that a state dict's has (its modules' versions)."""


def read_torch_file(path: str | Path) -> Any:
    """Returns what `torch.save` was given, with a `StoredTensor` for every tensor.

    Raises:
      UserError: not a whole file of PyTorch, or its pickle asks for what no tensor needs.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(_LEGACY_START)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if any(mark in start for mark in _LEGACY_MARKS):
        return _read_legacy(path)
    if start[:2] == b"PK":
        return _read_archive(path)
    if not start:
        raise UserError(f"{path}: not a file of PyTorch: it is empty; copy or download it again")
    if start[0] == pickle.PROTO[0]:
        raise UserError(f"{path}: not a file of PyTorch but another pickle; {_RESAVE}")
    raise UserError(
        f"{path}: not a file of PyTorch: begins with {start[:8]!r}, expected a ZIP archive or a "
        "pickle as torch.save writes them"
    )


def _read_archive(path: Path) -> Any:
    with _damage_told(path):
        archive = zipfile.ZipFile(path)  # stays open: the tensors are read later
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise UserError(f"{path}: a ZIP archive, but not one of torch.save: no data.pkl in it")
    folder = pickles[0].removesuffix("data.pkl")

    def load(storage: _Storage) -> np.ndarray:
        with _damage_told(path):
            entry = archive.getinfo(f"{folder}data/{storage.key}")
            dtype = _dtype(storage).newbyteorder(order)
            # Stored as they are: a compressed entry could unpack to any size.
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {storage.key} is compressed")
            if entry.file_size != storage.size * dtype.itemsize:
                raise ValueError(
                    f"storage {storage.key} has {entry.file_size} bytes, expected "
                    f"{storage.size * dtype.itemsize}"
                )
            flat = np.frombuffer(archive.read(entry), dtype)
            return flat.astype(dtype.newbyteorder("="), copy=False)

    with _damage_told(path):
        names = set(archive.namelist())
        order = "<"
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") == b"big":
            order = ">"
        return _Unpickler(io.BytesIO(archive.read(pickles[0])), path, load).load()


def _read_legacy(path: Path) -> Any:
    places: dict[str, int] = {}  # key of a storage -> where its numbers begin

    def load(storage: _Storage) -> np.ndarray:
        flat = np.fromfile(path, _dtype(storage), storage.size, offset=places[storage.key])
        if len(flat) != storage.size:
            raise UserError(f"{path}: ends while it is read; is it being written?")
        return flat.astype(flat.dtype.newbyteorder("="), copy=False)

    with _damage_told(path), path.open("rb") as file:
        magic, version, system = (_Unpickler(file, path, load).load() for _ in range(3))
        if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION or type(system) is not dict:
            raise ValueError(f"unknown version {version!r}")
        if not system.get("little_endian", True):
            raise ValueError("written by a big-endian machine")
        unpickler = _Unpickler(file, path, load)
        result = unpickler.load()
        end = path.stat().st_size
        for key in _Unpickler(file, path, load).load():
            storage = unpickler.storages[key]
            size = int.from_bytes(file.read(8), "little", signed=True)
            if size != storage.size:
                raise ValueError(f"storage {key} has {size} numbers, expected {storage.size}")
            places[key] = file.tell()
            if file.seek(size * _dtype(storage).itemsize, io.SEEK_CUR) > end:
                raise ValueError(f"ends within storage {key}")
        if absent := unpickler.storages.keys() - places.keys():
            raise ValueError(f"storage {min(absent)} is missing")
        return result


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file makes fail into one line."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # unpickling random bytes can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: damaged or truncated ({reason}); copy or download it again"
        ) from None


class _Unpickler(pickle._Unpickler):
    """Unpickles the tensors of a state dict and nothing else.

    The one in Python, not the one in C, which reserves as much memory as a damaged file asks for.
    """

    def __init__(self, file: Any, path: Path, load: Callable[[_Storage], np.ndarray]) -> None:
        super().__init__(file, encoding="utf-8")
        self._path, self._load = path, load
        self.storages: dict[str, _Storage] = {}

    def load_build(self) -> None:
        """Drops an object's attributes: none is wanted, and a tensor's have been checked."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Dict | _Inert):
            raise ValueError("attributes of something that has none")

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module: str, name: str) -> Any:
        """Returns our counterpart of the few names a state dict needs."""
        if module == "torch" and name in _STORAGES:
            return name
        known = {
            ("collections", "OrderedDict"): _Dict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("argparse", "Namespace"): _Inert,
        }
        if (module, name) in known:
            return known[module, name]
        raise UserError(
            f"{self._path}: holds more than tensors: its pickle asks for {module}.{name}, which no "
            f"state dict needs; {_RESAVE}"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage a tensor refers to: ("storage", type, key, place, size, view).

        A view, a part of a storage under a name of its own, was last written by PyTorch 0.3.
        """
        tag, kind, key, _, size, *view = pid
        if tag != "storage" or kind not in _STORAGES or type(key) is not str or not _is_size(size):
            raise ValueError(f"unknown storage {pid!r}")
        if view not in ([], [None]):
            raise UserError(
                f"{self._path}: has parts of storages under names of their own, as PyTorch before "
                "0.4 wrote them; load it with a newer one and save it again"
            )
        storage = _Storage(key, kind, size)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key} has two descriptions")
        return storage

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        """Stands for torch._utils._rebuild_tensor_v2."""
        numbers = (offset, *shape, *strides)
        if (
            not isinstance(storage, _Storage)
            or not all(map(_is_size, numbers))
            or len(shape) != len(strides)
        ):
            raise ValueError("a tensor is not described as one")
        # An empty tensor refers to nothing; any other stays within its storage.
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count and (last >= storage.size or count > storage.size):
            raise ValueError(f"a tensor reaches beyond storage {storage.key}")
        return StoredTensor(
            _STORAGES[storage.kind][1], tuple(shape), tuple(strides), offset, storage, self._load
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_tensors(value: Any) -> bool:
    """Whether it is a state dict: names and tensors, at least one."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, StoredTensor) for k, v in value.items())
    )
