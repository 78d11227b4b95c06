"""Starting a run from weights that were trained before (init.weights)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from effv2_jax.data.kinds import KINDS, get_kind
from effv2_jax.errors import UserError
from effv2_jax.models.block_spec import format_block
from effv2_jax.pretrained import open_weights

_CLASSIFIER = "params/classifier/"
_LISTED = 6  # names told before "and N more"

# What weights were trained with and no shape of a tensor tells.
_ATTRIBUTES = ("activation", "padding", "bn_epsilon")

# Of 255: V2's own 128 and the 127.5 of fine-tuning are the same for a network, as officially used.
_SAME_NORMALIZATION = 1.0


def transfer(
    variables: Mapping[str, Any], model: nn.Module, *, spec: str, preprocessing: str
) -> tuple[dict[str, Any], str]:
    """Puts trained weights into fresh variables.

    The classifier stays fresh where the weights were trained for another number of classes
    (official: utils.py, get_ckpt_var_map); everything else must fit.

    Args:
      variables: {"params": ..., "batch_stats": ...} of `model`, fresh.
      model: the network of the run.
      spec: WEIGHTS, see `pretrained.open_weights`.
      preprocessing: kind of the run's images, see `data.preprocess`.

    Returns:
      The variables as NumPy arrays, and one line that says what came from where.

    Raises:
      UserError: no such weights, or those of another network, or for images that are normalised
        otherwise; names what does not fit.
    """
    other, loaded, info = open_weights(spec)
    images = _check_images(info.get("preprocessing"), preprocessing, spec=spec)
    ours = traverse_util.flatten_dict(variables, sep="/")
    theirs = traverse_util.flatten_dict(loaded, sep="/")
    fresh = set()
    if other.num_classes != model.num_classes:
        fresh = {name for name in ours if name.startswith(_CLASSIFIER)}
        theirs = {k: v for k, v in theirs.items() if not k.startswith(_CLASSIFIER)}
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
            f"set {', '.join(_shape_flags(other, model))}"
            if other.variant == model.variant
            else f"set --config.model.name={other.variant} or choose other weights"
        )
        raise UserError(
            f"init.weights = {spec}: weights of {other.variant!r}, which do not fit the network of "
            f"the config ({model.variant!r}): {told}; {advice}"
        )
    _check_attributes(other, model, spec=spec)
    result = {name: np.asarray(theirs.get(name, value)) for name, value in ours.items()}
    classifier = (
        f"; the classifier is new ({model.num_classes} classes instead of {other.num_classes})"
        if fresh
        else ""
    )
    message = f"init: {len(theirs)} tensors of {spec}{classifier}{images}"
    return traverse_util.unflatten_dict(result, sep="/"), message


def _shape_flags(other: nn.Module, model: nn.Module) -> list[str]:
    """The flags that give the run's network the shapes of the other one."""
    flags = [
        f"--config.model.{name}={getattr(other, name)}"
        for name in ("width", "depth")
        if getattr(other, name) != getattr(model, name)
    ]
    if other.blocks != model.blocks:
        flags.append(f"--config.model.blocks={','.join(map(format_block, other.blocks))}")
    return flags


def _check_attributes(other: nn.Module, model: nn.Module, *, spec: str) -> None:
    """Refuses weights that mean another function though every shape fits."""
    different = [
        f"--config.model.{name}={getattr(other, name)} (the config has {getattr(model, name)})"
        for name in _ATTRIBUTES
        if _meaning(getattr(other, name)) != _meaning(getattr(model, name))
    ]
    if different:
        raise UserError(
            f"init.weights = {spec}: trained with other settings: set {', '.join(different)}"
        )


def _meaning(value: Any) -> Any:
    return "silu" if value in ("swish", "silu_native") else value


def _check_images(made_with: Mapping[str, Any] | None, kind: str, *, spec: str) -> str:
    """Compares the images of the weights with those of the run; returns what to say of them."""
    if made_with is None:
        return "; they do not say how their images were made"
    ours = get_kind(kind)
    if _differ(made_with, ours):
        fitting = [name for name, other in KINDS.items() if not _differ(made_with, other)]
        fitting.sort(key=lambda name: name != made_with["kind"])
        advice = (
            f"set --config.data.preprocessing={fitting[0]}"
            if fitting
            else "there is no such kind of data.preprocessing: choose other weights"
        )
        raise UserError(
            f"init.weights = {spec}: trained on images normalised by mean "
            f"{_numbers(made_with['mean'])} and deviation {_numbers(made_with['std'])}; "
            f"data.preprocessing = {kind!r} has {_numbers(ours.mean)} and {_numbers(ours.std)}: "
            f"{advice}"
        )
    if made_with["kind"] != kind:
        return f"; their images were made as {made_with['kind']!r}, the run's are {kind!r}"
    return ""


def _differ(made_with: Mapping[str, Any], kind: Any) -> bool:
    differences = [
        np.subtract(made_with["mean"], kind.mean),
        np.subtract(made_with["std"], kind.std),
    ]
    return bool(np.max(np.abs(differences)) > _SAME_NORMALIZATION)


def _numbers(values: Any) -> str:
    return "/".join(f"{value:.4g}" for value in dict.fromkeys(values))


def _listing(names: list[str]) -> str:
    names = sorted(names, key=lambda name: not name.startswith("params/"))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
