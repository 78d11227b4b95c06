"""The JSON object in the header of our weights file (weights_file.py says what is in it)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effv2_jax.errors import UserError

FORMAT = 1
KEY = "effv2_jax"  # of the header's metadata

# What the caller may say about the weights; the rest of the header follows from the model.
TOLD = ("image_size", "preprocessing", "labels", "source", "metrics")
DERIVED = ("format", "model", "overrides", "num_classes", "created_with")

_PREPROCESSING = ("kind", "mean", "std", "crop", "interpolation")
_CHANNELS = 3


def parse_header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns the object as it was saved.

    Args:
        path: of the file, for messages.
        metadata: of its safetensors header.

    Raises:
        UserError: there is none, it is of another version, or values in it are impossible; all of
            these are named.
    """
    if not metadata or KEY not in metadata:
        raise UserError(
            f"{path}: a safetensors file, but not one of ours: no {KEY!r} in its header; convert "
            "weights of other frameworks with tools/convert_*.py"
        )
    try:
        info = json.loads(metadata[KEY])
    except ValueError as error:
        raise UserError(f"{path}: its header is damaged: {KEY} is not JSON ({error})") from None
    if not isinstance(info, dict):
        raise UserError(f"{path}: its header is damaged: {KEY} is no JSON object")
    if info.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {info.get('format')!r}, this version of effv2_jax reads {FORMAT}; "
            "install the version that wrote it, or a newer one"
        )
    if missing := [key for key in (*DERIVED, *TOLD) if key not in info]:
        raise UserError(f"{path}: its header lacks {', '.join(missing)}; convert or save it again")
    if problems := header_problems(info):
        raise UserError(
            f"{path}: its header is damaged: {'; '.join(problems)}; convert or save it again"
        )
    return info


def header_problems(info: Mapping[str, Any]) -> list[str]:
    """Returns what cannot be in a complete header, one text each; [] if nothing."""
    problems = []

    def check(key: str, right: bool, wanted: str) -> None:
        if not right:
            problems.append(f"{key} is {info[key]!r}"[:100] + f", expected {wanted}")

    classes, labels = info["num_classes"], info["labels"]
    check("model", isinstance(info["model"], str), "a name")
    check("overrides", isinstance(info["overrides"], dict), "an object")
    check("num_classes", type(classes) is int and classes >= 0, "a whole number from 0 on")
    check("image_size", type(info["image_size"]) is int and info["image_size"] > 0, "pixels")
    for key in ("source", "metrics"):
        check(key, isinstance(info[key] or {}, dict), "an object or null")
    named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    check("labels", labels is None or named, "a list of names or null")
    if named and type(classes) is int and len(labels) != classes:
        problems.append(f"{len(labels)} labels for {classes} classes")
    return problems + _preprocessing_problems(info["preprocessing"])


def _preprocessing_problems(found: Any) -> list[str]:
    """Like `header_problems`; which kinds there are, data/kinds.py knows."""
    if found is None:
        return []
    if not isinstance(found, dict) or set(found) != set(_PREPROCESSING):
        told = sorted(found) if isinstance(found, dict) else repr(found)[:100]
        return [f"info['preprocessing'] has {told}, expected {sorted(_PREPROCESSING)} or null"]
    problems = [
        f"preprocessing: {key} is {found[key]!r}"[:100] + f", expected {wanted}"
        for key, wanted, right in (
            ("mean", "three numbers", _three(found["mean"], above=-math.inf)),
            ("std", "three numbers above 0", _three(found["std"], above=0)),
        )
        if not right
    ]
    return problems + [
        f"preprocessing: {key} is {found[key]!r}"[:100] + ", expected a name"
        for key in ("kind", "crop", "interpolation")
        if not isinstance(found[key], str)
    ]


def _three(values: Any, *, above: float) -> bool:
    return (
        isinstance(values, list)
        and len(values) == _CHANNELS
        and all(
            type(value) in (int, float) and math.isfinite(value) and value > above
            for value in values
        )
    )
