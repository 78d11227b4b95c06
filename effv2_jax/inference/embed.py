"""Pooled features of pictures, for search, clusters and probes: what tools/embed.py does.

The file holds

    features      float32 [N, C], the input of the classifier in inference mode
    names         [N] paths of the pictures
    labels        [N] names of the folders they lie in
    model         name of the network
    weights       as they were named
    sha256        of the weights file
    image_size    px

and opens with `numpy.load("features.npz")`, without pickles.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.command import say, written
from effv2_jax.errors import UserError
from effv2_jax.inference.forward import forward
from effv2_jax.inference.pictures import folder_name
from effv2_jax.inference.progress import Progress
from effv2_jax.inference.reading import PictureReader
from effv2_jax.inference.weights import open_for_use
from effv2_jax.startup import enable_compilation_cache


def run(
    spec: str,
    pictures: Sequence[str],
    *,
    out: str,
    image_size: int | None = None,
    batch_size: int = 32,
    skip_broken: bool = False,
) -> None:
    """Computes the features of all pictures and writes the file.

    Args:
        spec: a weights file, or NAME:WEIGHTS.
        pictures: paths.
        out: the file; it is complete or as it was.
        image_size: px; None: the size the weights are meant for.
        batch_size: pictures computed at a time.
        skip_broken: leave out files that are no pictures, instead of naming them and stopping.

    Raises:
        UserError: the weights cannot be used, a picture is broken, or the file cannot be written.
    """
    started = time.monotonic()
    enable_compilation_cache("auto")
    weights = open_for_use(spec, image_size=image_size)
    model = weights.model.clone(num_classes=0)
    program = forward(
        model,
        _without_classifier(weights.variables),
        kind=weights.kind,
        batch_size=min(batch_size, len(pictures)),
    )
    progress = Progress(len(pictures))
    skipped: list[str] = []

    def leave_out(path: str, reason: str) -> None:
        skipped.append(path)
        progress.line(f"left out: {path}: {reason}")

    reader = PictureReader(
        kind=weights.kind,
        image_size=weights.image_size,
        batch_size=program.batch_size,
        on_broken=leave_out if skip_broken else None,
    )
    names: list[str] = []
    features: list[np.ndarray] = []
    for batch in reader.batches(pictures):
        features.append(np.asarray(program(batch.images))[: len(batch.pictures)])
        names += [picture.path for picture in batch.pictures]
        progress.show(len(names) + len(skipped))
    progress.end()
    if not names:
        raise UserError(f"none of the {len(pictures)} files is a picture")
    table = np.concatenate(features).astype(np.float32)
    with written(out) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            features=table,
            names=np.asarray(names),
            labels=np.asarray([folder_name(name) for name in names]),
            model=np.asarray(weights.info["model"]),
            weights=np.asarray(spec),
            sha256=np.asarray(_sha256(spec, weights.info)),
            image_size=np.asarray(weights.image_size),
        )
    left_out = f", {len(skipped):,} left out" if skipped else ""
    seconds = time.monotonic() - started
    say(f"{out}: {table.shape[0]:,} x {table.shape[1]:,} features{left_out}, {seconds:.1f} s")


def _without_classifier(variables: Mapping[str, Any]) -> dict[str, Any]:
    params = {name: value for name, value in variables["params"].items() if name != "classifier"}
    return {**variables, "params": params}


def _sha256(spec: str, info: Mapping[str, Any]) -> str:
    """Of the weights file; of released weights, that of the file they were converted from."""
    if not Path(spec).is_file():
        return (info.get("source") or {}).get("sha256") or ""
    with open(spec, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
