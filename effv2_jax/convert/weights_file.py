"""Our weights file: safetensors, float32, with everything needed to use the weights again.

The tensors are named by their paths ("params/stem/conv/kernel", "batch_stats/stem/norm/mean").
The header's metadata has one key, `effv2_jax`, a JSON object:

    format           1
    model            name of the variant
    overrides        create_model(model, num_classes, **overrides) makes the network
    num_classes      outputs; 0: pooled features
    image_size       px, at which the weights are meant to be used
    preprocessing    {"kind", "mean", "std", "crop", "interpolation"}, or null if unknown
    labels           names of the classes, or null
    source           {"framework", "file", "sha256", "weights": "raw" or "ema"}, or null
    metrics          what was measured with these weights
    created_with     versions

Any safetensors reader opens the file without this project. Equal weights give equal bytes: there
is no date in it.
"""

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from effv2_jax import __version__
from effv2_jax.atomic import replacing
from effv2_jax.convert.comparison import differences, expected, flatten, nest, not_finite
from effv2_jax.convert.weights_header import (
    DERIVED,
    FORMAT,
    KEY,
    TOLD,
    header_problems,
    parse_header,
)
from effv2_jax.errors import UserError
from effv2_jax.models.block_spec import format_block
from effv2_jax.models.network import EfficientNet, create_model
from effv2_jax.models.variants import get_variant

# How a network is computed or trained, not what it is.
_NOT_SAVED = ("variant", "num_classes", "dtype", "remat", "remat_fused", "remat_norms", "lowering",
              "axis_name", "channel_parallel", "survival_fn", "initializer", "bn_group_size",
              "bn_two_pass", "freeze", "parent", "name")  # fmt: skip


def save_weights(
    path: str | Path,
    model: EfficientNet,
    variables: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    *,
    verify: bool = False,
) -> None:
    """Writes the weights file; the one that was there stays until the new one is complete.

    Args:
        path: the file, by custom "*.safetensors".
        model: the network, from `create_model`.
        variables: {"params": ..., "batch_stats": ...} of the model.
        info: image_size, preprocessing, labels, source, metrics (see above), each optional; what
            `load_weights` returned is accepted as it is.
        verify: read everything back and compare it bit by bit before the file gets its name.

    Raises:
        UserError: the variables are not the model's or not finite, the info is inconsistent, or
            the file cannot be written or reads back differently; all problems are named.
    """
    path = Path(path)
    tensors = {name: np.asarray(value) for name, value in flatten(variables)}
    header = _header(path, model, dict(info or {}))
    found = {name: ("float32", tensor.shape) for name, tensor in tensors.items()}
    problems = differences(found, expected(model)) + not_finite(tensors)
    if problems:
        raise UserError(f"{path}: not written: {'; '.join(problems)}")
    tensors = {name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}
    try:
        with replacing(path) as temporary:
            safetensors.numpy.save_file(tensors, temporary, {KEY: json.dumps(header)})
            if verify:
                _verify(path, temporary, tensors)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written: {reason}") from None


def load_weights(path: str | Path) -> tuple[EfficientNet, dict[str, Any], dict[str, Any]]:
    """Reads a weights file.

    Returns:
        model: the network, computing in float32 (`model.clone(dtype=...)` changes that).
        variables: {"params": ..., "batch_stats": ...} of float32 jax.Arrays.
        info: the header, see above: model, num_classes, image_size, preprocessing, labels, ...

    Raises:
        UserError: no such file, not a whole weights file of ours, or not the weights of the
            network its header describes; all problems are named.
    """
    path = Path(path)
    info, tensors, found = _read(path)
    try:
        model = create_model(info["model"], info["num_classes"], **info["overrides"])
    except (UserError, TypeError, ValueError) as error:  # overrides may be of any type
        raise UserError(f"{path}: its header describes no known network: {error}") from None
    problems = differences(found, expected(model)) + not_finite(tensors)
    if problems:
        raise UserError(
            f"{path}: not the weights of {info['model']} as its header says: {'; '.join(problems)}"
        )
    variables = nest(jax.device_put(tensors))
    return model, variables, info


def read_info(path: str | Path) -> dict[str, Any]:
    """Reads only the header of a weights file.

    Raises:
        UserError: as `load_weights`, as far as the header goes.
    """
    path = Path(path)
    with _opened(path) as file:
        return parse_header(path, file.metadata())


def _opened(path: Path) -> Any:
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {kind}; expected a .safetensors weights file")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); copy, download or convert it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _verify(path: Path, temporary: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Compares a file with what was written to it, tensor by tensor, bit by bit.

    With plain reads, by safetensors' layout (length of the header, header, tensors): its own reader
    maps the whole file into memory.
    """
    with temporary.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        places = json.loads(file.read(length))
        different = []
        for name, tensor in tensors.items():
            begin, end = places[name]["data_offsets"] if name in places else (0, 0)
            file.seek(8 + length + begin)
            found = np.fromfile(file, np.uint32, (end - begin) // 4)
            if not np.array_equal(found, tensor.reshape(-1).view(np.uint32)):
                different.append(name)
    if different:
        raise UserError(
            f"{path}: not written: {len(different)} tensors read back differently, first "
            f"{different[0]}; is the disk damaged?"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, tuple]]:
    """Returns the header, the tensors that are float32, and (dtype, shape) of all tensors."""
    tensors, found = {}, {}
    with _opened(path) as file:
        info = parse_header(path, file.metadata())
        for name in file.keys():  # noqa: SIM118 not a dict
            part = file.get_slice(name)
            dtype = {"F32": "float32"}.get(part.get_dtype(), part.get_dtype())
            found[name] = (dtype, tuple(part.get_shape()))
            if dtype == "float32":
                tensors[name] = file.get_tensor(name)
    return info, tensors, found


def _header(path: Path, model: EfficientNet, info: dict[str, Any]) -> dict[str, Any]:
    problems = [
        f"info has {key!r}, expected only {', '.join(TOLD)}"
        for key in info
        if key not in (*TOLD, *DERIVED)
    ]
    try:
        info = {key: _plain(value) for key, value in info.items()}
    except TypeError as error:
        problems.append(f"info has what JSON cannot keep: {error}")
    header = {
        "format": FORMAT,
        "model": model.variant,
        "overrides": _overrides(model),
        "num_classes": model.num_classes,
        "image_size": info.get("image_size") or get_variant(model.variant).eval_size,
        "preprocessing": info.get("preprocessing"),
        "labels": info.get("labels"),
        "source": info.get("source"),
        "metrics": info.get("metrics") or {},
        "created_with": {
            "effv2_jax": __version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "flax")},
        },
    }
    if problems := problems + header_problems(header):
        raise UserError(f"{path}: not written: {'; '.join(problems)}")
    return header


def _plain(value: Any) -> Any:
    """Returns the value as JSON keeps it; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _overrides(model: EfficientNet) -> dict[str, Any]:
    """The attributes in which the model differs from its variant, as JSON keeps them."""
    usual = create_model(model.variant, model.num_classes)
    overrides = {}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name in _NOT_SAVED or value == getattr(usual, field.name):
            continue
        is_blocks = field.name == "blocks"
        overrides[field.name] = [format_block(block) for block in value] if is_blocks else value
    return overrides
