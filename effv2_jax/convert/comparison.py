"""What is found in a file of weights against what a network needs, told in one line."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effv2_jax.models.network import EfficientNet

# (dtype, shape) of a tensor; dtypes as NumPy writes them.
Kind = tuple[str, tuple[int, ...]]

_LISTED = 8  # tensors named per kind of problem before "and N more"


def flatten(variables: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the leaves of a variable tree with their paths, "params/stem/conv/kernel"."""
    leaves, _ = jax.tree.flatten_with_path(variables)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def nest(leaves: Mapping[str, Any]) -> dict[str, dict]:
    """Returns the variable tree {"params": ..., "batch_stats": ...}; the inverse of `flatten`."""
    tree: dict[str, dict] = {"params": {}, "batch_stats": {}}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def expected(model: EfficientNet) -> dict[str, Kind]:
    """(dtype, shape) of every variable of the model, by path."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return {name: ("float32", leaf.shape) for name, leaf in flatten(shapes)}


def differences(found: Mapping[str, Kind], wanted: Mapping[str, Kind]) -> list[str]:
    """Returns what is missing, unexpected and different, one text per kind; [] if nothing."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    different = [
        f"{name} is {_text(found[name])}, expected {_text(wanted[name])}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("different", different))
    return [_list(kind, names) for kind, names in kinds if names]


def not_finite(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns a text that names the tensors with NaN or infinite values; [] if there are none."""
    return tell_not_finite({name: count_not_finite(tensor) for name, tensor in tensors.items()})


def count_not_finite(tensor: np.ndarray) -> tuple[int, int]:
    """Returns how many values are NaN or infinite, of how many."""
    return tensor.size - int(np.count_nonzero(np.isfinite(tensor))), tensor.size


def tell_not_finite(counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """Like `not_finite`, of counts made before by `count_not_finite`."""
    names = [f"{name} ({bad} of {size} values)" for name, (bad, size) in counts.items() if bad]
    return [_list("not finite", names)] if names else []


def _text(kind: Kind) -> str:
    dtype, shape = kind
    return f"{dtype}{list(shape)}"


def _list(kind: str, names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}"
