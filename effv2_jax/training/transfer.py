"""Starting a run from weights that were trained before (init.weights)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from effv2_jax.convert.weights_file import load_weights
from effv2_jax.errors import UserError

_CLASSIFIER = "params/classifier/"
_LISTED = 6  # names told before "and N more"


def transfer(
    variables: Mapping[str, Any], model: nn.Module, *, path: str
) -> tuple[dict[str, Any], str]:
    """Puts the weights of a file into fresh variables.

    The classifier stays fresh where the file was trained for another number of classes (official:
    utils.py, get_ckpt_var_map); everything else must fit.

    Args:
      variables: {"params": ..., "batch_stats": ...} of `model`, fresh.
      model: the network of the run.
      path: the weights file, see `convert.weights_file`.

    Returns:
      The variables as NumPy arrays, and one line that says what came from where.

    Raises:
      UserError: the file is no weights file, or that of another network; names what does not fit.
    """
    other, loaded, _ = load_weights(path)
    ours = traverse_util.flatten_dict(variables, sep="/")
    theirs = traverse_util.flatten_dict(loaded, sep="/")
    fresh = set()
    if other.num_classes != model.num_classes:
        fresh = {name for name in ours if name.startswith(_CLASSIFIER)}
        theirs = {name: value for name, value in theirs.items() if name not in fresh}
    problems = {
        "missing": sorted(set(ours) - set(theirs) - fresh),
        "not in the network": sorted(set(theirs) - set(ours)),
        "of another shape": sorted(
            name
            for name in set(ours) & set(theirs)
            if np.shape(ours[name]) != np.shape(theirs[name])
        ),
    }
    if any(problems.values()):
        told = "; ".join(f"{_listing(names)} {kind}" for kind, names in problems.items() if names)
        advice = (
            "model.width, depth and blocks must be those of the file"
            if other.variant == model.variant
            else f"set model.name={other.variant} or choose other weights"
        )
        raise UserError(
            f"init.weights = {path}: weights of {other.variant!r}, which do not fit the network of "
            f"the config ({model.variant!r}): {told}; {advice}"
        )
    result = {name: np.asarray(theirs.get(name, value)) for name, value in ours.items()}
    classifier = (
        f"; the classifier is new ({model.num_classes} classes instead of {other.num_classes})"
        if fresh
        else ""
    )
    message = f"init: {len(theirs)} tensors of {path}{classifier}"
    return traverse_util.unflatten_dict(result, sep="/"), message


def _listing(names: list[str]) -> str:
    names = sorted(names, key=lambda name: not name.startswith("params/"))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
