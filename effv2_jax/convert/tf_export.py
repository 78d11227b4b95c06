"""From our weights to the official TensorFlow names: a dictionary or a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.atomic import replacing
from effv2_jax.convert.bundle_writer import write_bundle
from effv2_jax.convert.mapping import from_variables
from effv2_jax.convert.names_tf import tensor_names
from effv2_jax.errors import UserError
from effv2_jax.models.network import EfficientNet

FORMATS = ("npz", "checkpoint")

# What the official code cannot be told: attribute -> the only value that it computes with.
_FIXED = {"padding": "SAME", "bn_epsilon": 1e-3}


def official_tensors(
    model: EfficientNet,
    variables: Mapping[str, Any],
    *,
    prefix: str | None = None,
    averages: bool = False,
) -> dict[str, np.ndarray]:
    """Returns the variables under their official names; exact.

    Args:
      model: the network.
      variables: {"params": ..., "batch_stats": ...}.
      prefix: the model's name in front of every name; None: that of the network; "": none.
      averages: also as moving averages, which the official evaluation prefers.

    Raises:
      UserError: the official code does not compute this network.
    """
    for attribute, official in _FIXED.items():
        if getattr(model, attribute) != official:
            raise UserError(
                f"{model.variant}: {attribute} is {getattr(model, attribute)!r}, TensorFlow's code "
                f"computes with {official!r} only: its checkpoint would give other predictions"
            )
    if any(block.two_convs for block in model.block_specs):
        raise UserError(f"{model.variant}: TensorFlow's code has no blocks like its first ones")
    prefix = model.variant if prefix is None else prefix
    names = tensor_names(model.block_specs, num_classes=model.num_classes)
    start = f"{prefix}/" if prefix else ""
    out = {f"{start}{name}": value for name, value in from_variables(variables, names).items()}
    if averages:
        out |= {f"{name}/ExponentialMovingAverage": value for name, value in out.items()}
    return out


def export(tensors: Mapping[str, np.ndarray], out: str | Path, *, format: str) -> list[Path]:
    """Writes official tensors and returns the files.

    Args:
      tensors: from `official_tensors`.
      out: the .npz file; of a checkpoint its prefix.
      format: one of FORMATS. A checkpoint gets a file `checkpoint` beside it, which TensorFlow's
        tools look for, unless there is one.

    Raises:
      UserError: the files cannot be written; what was there before is still there.
    """
    out = Path(out)
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; expected {' or '.join(FORMATS)}")
    if format == "checkpoint":
        write_bundle(out, tensors)
        state = out.with_name("checkpoint")
        if not state.exists():
            state.write_text(f'model_checkpoint_path: "{out.name}"\n')
        return [Path(f"{out}.index"), Path(f"{out}.data-00000-of-00001")]
    try:
        with replacing(out) as temporary, temporary.open("wb") as file:
            np.savez(file, **tensors)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    return [out]
