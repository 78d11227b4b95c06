"""Weights by name or file."""

from typing import Any

from effv2_jax.convert.weights_file import load_weights
from effv2_jax.models.network import EfficientNet


def open_weights(spec: str) -> tuple[EfficientNet, dict[str, Any], dict[str, Any]]:
    """Opens WEIGHTS as every command takes them.

    Args:
        spec: a weights file.

    Returns:
        model, variables and info, as `load_weights` returns them.

    Raises:
        UserError: no such file, or not a whole weights file.
    """
    return load_weights(spec)
