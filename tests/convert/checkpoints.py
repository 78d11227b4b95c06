"""The reference checkpoints, written by TensorFlow, and the network that is in them."""

import functools
import io
from pathlib import Path

import numpy as np

from effv2_jax.convert.bundle_writer import write_bundle
from effv2_jax.convert.checkpoint_files import CheckpointFiles, Extent
from effv2_jax.models.network import EfficientNet, create_model
from tests import reference

FOLDER = reference.DATA / "checkpoints"
WHOLE = ("full", "full_head_1", "ema_only", "raw_noprefix", "object", "tiny.tgz")


@functools.cache
def network() -> EfficientNet:
    """The tiny network of `checkpoints.json`; its name there is efficientnetv2-b0."""
    facts = reference.load_json("checkpoints/checkpoints.json")
    return create_model(
        "efficientnetv2-b0",
        facts["classes"],
        blocks=facts["blocks"],
        feature_size=facts["model"]["feature_size"],
    )


def expected(weights: str) -> dict[str, np.ndarray]:
    """The values by official name, of "raw" or "ema", as the training reference has them."""
    start = {"raw": "final/", "ema": "ema/"}[weights]
    stored = reference.load_npz("train/a_rmsprop.npz")
    return {key.removeprefix(start): v for key, v in stored.items() if key.startswith(start)}


def in_memory(index: bytes, *shards: bytes) -> CheckpointFiles:
    """A checkpoint that lies in no file."""

    def shard(i: int, count: int) -> Extent:
        return Extent(f"shard {i} of {count}", io.BytesIO(shards[i]), 0, len(shards[i]))

    return CheckpointFiles("memory", index, shard, ())


def content(name: str) -> tuple[bytes, ...]:
    """The bytes of the index and of the shards of a reference checkpoint."""
    folder = FOLDER / name
    (index,) = folder.glob("*.index")
    return index.read_bytes(), *(path.read_bytes() for path in sorted(folder.glob("*.data-*")))


def write_released(name: str, prefix: Path, *, weights: str) -> dict[str, np.ndarray]:
    """Writes the reference weights of an official network as its released checkpoint has them.

    The other kind, raw variables or averages, is there too, with other values.

    Args:
      name: of the network.
      prefix: of the checkpoint.
      weights: "raw" or "ema": where the reference's values are.

    Returns:
      The reference's values by official name.
    """
    values = reference.make_all(reference.model_facts(name)["variables"])
    tensors = {}
    for kind, suffix in (("raw", ""), ("ema", "/ExponentialMovingAverage")):
        for key, value in values.items():
            half = np.float32(1 if kind == weights else 0.5)
            tensors[f"{name}/{key}{suffix}"] = value * half
    write_bundle(prefix, tensors)
    return values


def copy(name: str, folder: Path) -> Path:
    """Copies a reference checkpoint to where it can be changed; returns its prefix."""
    for path in (FOLDER / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (index,) = folder.glob("*.index")
    return index.with_suffix("")
