"""From a file of PyTorch or a .safetensors file to the named tensors of one network.

What timm and torchvision share: which of the state dicts of a training checkpoint is taken, the
prefixes that wrappers put before the names, the counters of BatchNorm, tensors of half precision.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from effv2_jax.convert.torch_file import StoredTensor, is_tensors, read_torch_file
from effv2_jax.errors import UserError

# Where training scripts keep a moving average of the weights, and the weights; the average first.
_AVERAGES = ("state_dict_ema", "model_ema")
_KNOWN = (*_AVERAGES, "state_dict", "model")

_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile

# Last part of a name -> what it is called in the account. No part of what a network computes.
_COUNTERS = {"num_batches_tracked": "num_batches_tracked", "n_averaged": "n_averaged"}

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SAFETENSORS_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


# The flag of the commands that read training checkpoints.
KEY_FLAG = {
    "--key": {
        "metavar": "PART",
        "help": "part of a training checkpoint; default: the moving average, else the weights",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchWeights:
    """The tensors of one network.

    Attributes:
      tensors: name -> array, read when asked for; float32 where the file has another float type.
      weights: "ema" if the file says so, else "raw".
      num_read: tensors of the state dict, with the counters.
      left_out: kind -> how many of them are not in `tensors`.
      notes: what a person should know about the choice and the types, one line each.
    """

    tensors: Mapping[str, np.ndarray]
    weights: str
    num_read: int
    left_out: dict[str, int]
    notes: tuple[str, ...]


class _OnDemand(Mapping):
    """Arrays by name, each read when it is asked for: one tensor more than the result in memory."""

    def __init__(self, readers: dict[str, Callable[[], np.ndarray]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._readers[name]()
        return tensor.astype(np.float32) if tensor.dtype.name in _FLOATS else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def read_torch_weights(path: str | Path, *, key: str | None = None) -> TorchWeights:
    """Reads the state dict of a .safetensors, .pth, .pt or .bin file.

    Args:
      path: the file; its content decides, not its name.
      key: which part of a training checkpoint; None: the moving average if there is one, else the
        weights.

    Raises:
      UserError: no such file, not whole, with code in it, or without a state dict.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {kind}; expected a .safetensors or .pth file")
    notes = []
    if _is_safetensors(path):
        if key:
            raise UserError(f"{path}: a safetensors file has no parts: leave --key out")
        readers, dtypes = _open_safetensors(path)
        part = ""
    else:
        part, stored = _choose(read_torch_file(path), path, key)
        readers = {name: tensor.read for name, tensor in stored.items()}
        dtypes = {name: tensor.dtype for name, tensor in stored.items()}
        if part:
            notes.append(f"the part {part!r} of a training checkpoint was taken")
    num_read = len(readers)
    counters = {name: _COUNTERS.get(name.split(".")[-1]) for name in readers}
    left_out = collections.Counter(kind for kind in counters.values() if kind)
    names = [name for name in readers if not counters[name]]
    converted = collections.Counter(
        dtypes[name] for name in names if dtypes[name] in _FLOATS and dtypes[name] != "float32"
    )
    notes += [f"{count} tensors were {dtype}: now float32" for dtype, count in converted.items()]
    prefix = _common_prefix(names)
    tensors = {name.removeprefix(prefix): readers[name] for name in names}
    return TorchWeights(
        tensors=_OnDemand(tensors),
        weights="ema" if part in _AVERAGES else "raw",
        num_read=num_read,
        left_out=dict(left_out),
        notes=tuple(notes),
    )


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then JSON; or by its name."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or (path.suffix == ".safetensors" and start[:2] != b"PK")


def _open_safetensors(
    path: Path,
) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, str]]:
    try:
        file = safetensors.safe_open(path, framework="numpy")  # stays open: read when asked for
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from None
    if "effv2_jax" in (file.metadata() or {}):
        raise UserError(f"{path}: a weights file of effv2_jax already: nothing to convert")
    dtypes = {}
    for name in file.keys():  # noqa: SIM118 not a dict
        dtype = file.get_slice(name).get_dtype()
        dtypes[name] = _SAFETENSORS_TYPES.get(dtype, dtype)
    return {name: (lambda name=name: file.get_tensor(name)) for name in dtypes}, dtypes


def _choose(content: Any, path: Path, key: str | None) -> tuple[str, dict[str, StoredTensor]]:
    """Returns the name of the part ("" if the file is the state dict) and its tensors."""
    if is_tensors(content):
        if key:
            raise UserError(f"{path}: has no part {key!r}, it is one state dict: leave --key out")
        return "", content
    parts = {}
    if isinstance(content, Mapping):
        parts = {name: part for name, part in content.items() if is_tensors(part)}
    told = f"it has {', '.join(map(repr, parts)) or 'none'}"
    if key:
        if key not in parts:
            raise UserError(f"{path}: no state dict {key!r}: {told}")
        return key, parts[key]
    for name in _KNOWN:
        if name in parts:
            return name, parts[name]
    if len(parts) == 1:
        return next(iter(parts.items()))
    if parts:
        raise UserError(f"{path}: which state dict? {told}: choose one with --key")
    raise UserError(
        f"{path}: no state dict in it (names and tensors); expected what "
        "torch.save(model.state_dict(), ...) writes"
    )


def _common_prefix(names: list[str]) -> str:
    prefix = ""
    for _ in _PREFIXES * 2:
        for each in _PREFIXES:
            if names and all(name.startswith(prefix + each) for name in names):
                prefix += each
    return prefix
