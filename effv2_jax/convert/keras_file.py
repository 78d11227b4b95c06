"""Reads weights that Keras wrote: .weights.h5 and .keras (Keras 3), .h5 (Keras 2 and 3).

All are HDF5. Keras 3's layout has one group per layer, `layers/<class>_<n>/vars/<i>`, whose
attribute `name` is the layer's (keras/src/saving/saving_lib.py); the old one lists `layer_names`,
and per layer `weight_names` (keras/src/legacy/saving/legacy_h5_format.py). A .keras file is a ZIP
archive with such a .weights.h5 in it. Nothing of the model's own configuration is run or read.
"""

import collections
import dataclasses
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.errors import UserError

_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_NORMALIZATION = ("mean", "variance", "count")
_KERNEL = ("kernel", "bias")
_LISTS = ("layers", "_layer_checkpoint_dependencies")  # Keras 3; Keras 2.12 to 2.15
_WEIGHTS_IN_ARCHIVE = "model.weights.h5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KerasWeights:
    """The tensors of a file.

    Attributes:
      tensors: "layer/tensor" -> array, e.g. "stem_bn/gamma".
      left_out: kind -> how many tensors are no weights of a layer.
      layers: names of all layers, also of those without weights.
    """

    tensors: dict[str, np.ndarray]
    left_out: dict[str, int]
    layers: tuple[str, ...]


def read_keras_file(path: str | Path) -> KerasWeights:
    """Reads the file.

    Raises:
      UserError: no such file, not whole, not of Keras, or h5py is not installed.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {kind}; expected a .weights.h5, .keras or .h5 file")
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading HDF5 needs h5py: pip install h5py") from None
    try:
        with h5py.File(_hdf5(path), "r") as file:
            return _read(path, file, h5py)
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a whole HDF5 file of Keras ({reason}); copy, download or save it again"
        ) from None


def _hdf5(path: Path) -> Path | io.BytesIO:
    """The file, or the weights in a .keras archive."""
    if not zipfile.is_zipfile(path):
        return path
    try:
        with zipfile.ZipFile(path) as archive:
            return io.BytesIO(archive.read(_WEIGHTS_IN_ARCHIVE))
    except (KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path}: not a whole .keras file ({error})") from None


def _read(path: Path, file: Any, h5py: Any) -> KerasWeights:
    groups = [key for key in _LISTS if key in file]
    if groups:
        layers = _modern_layers(path, file[groups[0]], h5py)
        left_out = {"optimizer slots": _count(file, "optimizer", h5py)}
        random = _count(file[groups[0]], "", h5py, within="seed_generator")
        left_out["random seeds"] = random
    else:
        root = file.get("model_weights", file)
        if "layer_names" not in root.attrs:
            raise UserError(
                f"{path}: an HDF5 file, but not of Keras: neither 'layers' nor 'layer_names' in it"
            )
        layers = list(_old_layers(root))
        left_out = {"optimizer slots": _count(file, "optimizer_weights", h5py)}
    tensors = {}
    for layer, arrays in layers:
        for leaf, array in arrays:
            tensors[f"{layer}/{leaf}"] = array
    left_out = collections.Counter({kind: n for kind, n in left_out.items() if n})
    return KerasWeights(
        tensors=tensors, left_out=dict(left_out), layers=tuple(layer for layer, _ in layers)
    )


def _modern_layers(path: Path, group: Any, h5py: Any) -> list[tuple[str, list]]:
    out = []
    for key in group:
        variables = group[key].get("vars")
        if not isinstance(variables, h5py.Group):
            continue
        name = variables.attrs.get("name")
        if name is None and len(variables):
            raise UserError(
                f"{path}: its layers have no names (written by an older Keras); save it again "
                "with a newer one, or as .h5"
            )
        layer = _text(name) if name is not None else key
        arrays = [np.asarray(variables[i]) for i in sorted(variables, key=int)]
        out.append((layer, list(zip(_leaves(layer, len(arrays)), arrays, strict=True))))
    return out


def _old_layers(root: Any) -> Iterator[tuple[str, list]]:
    for layer in map(_text, root.attrs["layer_names"]):
        names = [_text(name) for name in root[layer].attrs["weight_names"]]
        arrays = [np.asarray(root[layer][name]) for name in names]
        # "stem_bn/gamma:0" of Keras 2, "stem_bn/gamma" of Keras 3.
        leaves = [re.sub(r":\d+$", "", name).split("/")[-1] for name in names]
        leaves = ["kernel" if leaf == "depthwise_kernel" else leaf for leaf in leaves]
        yield layer, list(zip(leaves, arrays, strict=True))


def _leaves(layer: str, count: int) -> tuple[str, ...]:
    """Names of a layer's tensors, which Keras 3 only numbers, in its order of creation."""
    if count > len(_KERNEL):
        known = _NORM if count == len(_NORM) else _NORMALIZATION
    else:
        known = _KERNEL
    return known[:count] if count <= len(known) else tuple(map(str, range(count)))


def _count(file: Any, key: str, h5py: Any, *, within: str = "") -> int:
    """Number of arrays under a key, and there under groups whose path has `within`."""
    if key and key not in file:
        return 0
    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and within in name:
            found.append(name)

    (file[key] if key else file).visititems(visit)
    return len(found)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
