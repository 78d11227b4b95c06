"""From a TensorFlow checkpoint of the official code to our variables, without TensorFlow.

Reads what google/automl's efficientnetv2 (main.py, main_tf2.py, Keras' save_weights) and
tensorflow/tpu's efficientnet write and release; `generations` says what that may look like.
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from effv2_jax.convert import checkpoint_files, generations
from effv2_jax.convert.conversion import Conversion, default_info, resolve_model, sha256_of
from effv2_jax.convert.generations import GRAPH_KEY, Contents
from effv2_jax.convert.mapping import to_variables
from effv2_jax.convert.names_tf import tensor_names
from effv2_jax.convert.tensor_bundle import Bundle
from effv2_jax.errors import UserError
from effv2_jax.models.block_spec import BlockSpec, expand_blocks, round_channels
from effv2_jax.models.network import EfficientNet
from effv2_jax.models.variants import get_variant, list_models

EMA = ("auto", "raw", "ema")
_WEIGHTS = {"raw": "raw variables", "ema": "moving averages"}

# What tells networks apart: channels of the stem, of every block, of the head.
Signature = tuple[int, ...]


def convert(
    path: str | Path,
    *,
    model: str | EfficientNet,
    num_classes: int | None = None,
    ema: str = "auto",
) -> Conversion:
    """Reads a checkpoint.

    Args:
      path: a folder, a prefix, one of the checkpoint's files, or an archive (.tgz, .tar.gz, .tar).
      model: name of the network, or a changed one from `create_model`.
      num_classes: what is expected; None: whatever the checkpoint has.
      ema: "raw", "ema" (the moving averages), or "auto": the averages if there are any.

    Raises:
      UserError: no checkpoint, damaged, of another network, with unknown or missing tensors.
    """
    start = time.monotonic()
    if ema not in EMA:
        raise UserError(f"ema is {ema!r}; expected one of {', '.join(EMA)}")
    files = checkpoint_files.find(path)
    bundle = Bundle(files)
    network = resolve_model(model, num_classes)
    contents = _sort(bundle)
    weights, keys = _choose(contents, ema, bundle.where)
    shapes = {name: bundle.entries[key].shape for name, key in keys.items()}
    _check_model(shapes, network, bundle.where)
    network = network.clone(num_classes=_classes(shapes, num_classes, bundle.where))

    tensors = bundle.read(set(keys.values()))
    tensors = {name: tensors.pop(key) for name, key in keys.items() if key in tensors}
    tensors |= {key: np.empty(0, np.float32) for key in contents.unknown}
    names = tensor_names(network.block_specs, num_classes=network.num_classes)
    variables = to_variables(tensors, names, network, where=bundle.where)

    other = len(contents.raw if weights == "ema" else contents.average)
    left_out = {_WEIGHTS["raw" if weights == "ema" else "ema"]: other, **contents.left_out}
    info = default_info(
        network.variant,
        framework="tensorflow",
        file=path,
        sha256=sha256_of(*files.hashed),
        num_classes=network.num_classes,
        weights=weights,
    )
    return Conversion(
        model=network,
        variables=variables,
        info=info,
        num_read=len(bundle.entries),
        left_out={key: count for key, count in left_out.items() if count},
        seconds=time.monotonic() - start,
    )


def tensor_keys(bundle: Bundle, *, ema: str) -> dict[str, str]:
    """Official name without the model's -> name in the checkpoint, of the chosen weights.

    Args:
      bundle: the checkpoint.
      ema: as of `convert`.
    """
    return _choose(_sort(bundle), ema, bundle.where)[1]


def _sort(bundle: Bundle) -> Contents:
    if GRAPH_KEY in bundle.entries:
        graph = bundle.read_string(GRAPH_KEY)
        return generations.by_object(bundle.entries, graph, where=bundle.where)
    return generations.by_name(bundle.entries, where=bundle.where)


def _choose(contents: Contents, ema: str, where: str) -> tuple[str, dict[str, str]]:
    """Returns "raw" or "ema" and the names of the tensors."""
    weights = ("ema" if contents.average else "raw") if ema == "auto" else ema
    keys = contents.average if weights == "ema" else contents.raw
    if not keys and not contents.raw and not contents.average:
        found = ", ".join(contents.unknown[:4]) or "none"
        raise UserError(
            f"{where}: no variables of an EfficientNet in it: expected names like "
            f"NAME/stem/conv2d/kernel, found {found}"
        )
    if not keys:
        other = "raw" if weights == "ema" else "ema"
        raise UserError(f"{where}: only {_WEIGHTS[other]} in it: use --ema {other} or leave it out")
    return weights, keys


def _check_model(shapes: Mapping[str, tuple[int, ...]], model: EfficientNet, where: str) -> None:
    """Says which network a checkpoint is of, if it is another one."""
    found = _signature_found(shapes)
    if found is None or found == _signature(model.block_specs, model.head_channels):
        return
    for name in list_models():
        variant = get_variant(name)
        blocks = expand_blocks(variant.blocks, width=variant.width, depth=variant.depth)
        if found == _signature(blocks, round_channels(variant.feature_size, variant.width)):
            raise UserError(
                f"{where}: not the weights of {model.variant} but of {name}: use --model {name}"
            )
    raise UserError(
        f"{where}: not the weights of {model.variant}, nor of any network known here: it has "
        f"{len(found) - 2} blocks, a stem of {found[0]} channels and a head of {found[-1]}, "
        f"{model.variant} {len(model.block_specs)}, {model.stem_channels} and {model.head_channels}"
    )


def _signature(blocks: tuple[BlockSpec, ...], head: int) -> Signature:
    return (blocks[0].in_channels, *(block.channels for block in blocks), head)


def _signature_found(shapes: Mapping[str, tuple[int, ...]]) -> Signature | None:
    """The same of a checkpoint, from its norms; None: some of them are missing."""
    gammas: dict[str, tuple[str, int]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"([^/]+)/tpu_batch_normalization(?:_(\d))?/gamma", name)
        if match and len(shape) == 1:
            # The block's last norm, the one with the highest number, has its output channels.
            gammas[match[1]] = max(gammas.get(match[1], ("", 0)), (match[2] or "", shape[0]))
    parts = ["stem", *(f"blocks_{i}" for i in range(len(gammas) - 2)), "head"]
    if len(gammas) < 3 or set(parts) != set(gammas):
        return None
    return tuple(gammas[part][1] for part in parts)


def _classes(shapes: Mapping[str, tuple[int, ...]], expected: int | None, where: str) -> int:
    shape = shapes.get("head/dense/bias", (0,))
    found = shape[0] if len(shape) == 1 else 0
    if expected is not None and found != expected:
        raise UserError(
            f"{where}: has {found} classes, expected {expected}: leave --num-classes out to keep "
            "them all"
        )
    return found
