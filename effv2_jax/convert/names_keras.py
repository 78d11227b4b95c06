"""keras.applications' names of our variables, and what its networks are.

keras/src/applications/efficientnet.py (V1) and efficientnet_v2.py. Blocks are called by stage and
letter, "block2a_". The networks normalise images themselves, in layers that here belong to the
preprocessing.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.convert.conversion import Conversion, default_info, sha256_of
from effv2_jax.convert.keras_file import KerasWeights, read_keras_file
from effv2_jax.convert.layer_names import KERAS, NumberedBlock, name_table
from effv2_jax.convert.mapping import TensorName, to_variables
from effv2_jax.convert.source import Source, check_classes, find_source, released_blocks, resolve
from effv2_jax.data.kinds import describe
from effv2_jax.models.network import EfficientNet

_SIZES = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "b4": 380, "b5": 456, "b6": 528, "b7": 600,
          "s": 384, "m": 480, "l": 480}  # fmt: skip


def _v1(name: str) -> Source:
    model = f"efficientnet-{name}"
    # BatchNormalization's default momentum; V2 passes 0.9.
    overrides = {"bn_momentum": 0.99, **released_blocks(model)}
    return Source(f"EfficientNet{name.upper()}", model, _SIZES[name], "v1", overrides)


def _v2(name: str) -> Source:
    kind = "v1" if name.startswith("b") else "v2"
    return Source(f"EfficientNetV2{name.upper()}", f"efficientnetv2-{name}", _SIZES[name], kind)


SOURCES: tuple[Source, ...] = (
    *(_v2(name) for name in ("b0", "b1", "b2", "b3", "s", "m", "l")),
    *(_v1(name) for name in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")),
)

_OUTER = {
    "stem/conv": "stem_conv",
    "stem/norm": "stem_bn",
    "head/conv": "top_conv",
    "head/norm": "top_bn",
    "classifier": "predictions",
}
_BLOCK = {
    "expand_conv": "expand_conv",
    "expand_norm": "expand_bn",
    "depthwise_norm": "bn",
    "se/reduce": "se_reduce",
    "se/expand": "se_expand",
    "project_conv": "project_conv",
    "project_norm": "project_bn",
}

# V1's Normalization layer: (mean, variance) of the released weights are ImageNet's mean and
# DEVIATION; a second Rescaling by 1 / sqrt(deviation) behind it makes it right. Files may be older
# than that layer (tensorflow issue 49930).
_IMAGENET_MEAN = np.asarray([0.485, 0.456, 0.406])
_IMAGENET_DEVIATION = np.asarray([0.229, 0.224, 0.225])


def tensor_names(model: EfficientNet) -> tuple[TensorName, ...]:
    """Names of all variables of a network, ours and Keras' as "layer/tensor"."""
    is_v1 = not any(row.fused for row in model.blocks)
    depthwise = "dwconv" if is_v1 else "dwconv2"

    def block(numbered: NumberedBlock) -> dict[str, str]:
        prefix = f"block{numbered.stage + 1}{chr(ord('a') + numbered.position)}_"
        names = {ours: prefix + name for ours, name in _BLOCK.items()}
        return {**names, "depthwise_conv": prefix + depthwise}

    return name_table(model, KERAS, outer=_OUTER, block=block)


def convert(
    path: str | Path, *, model: str | EfficientNet, num_classes: int | None = None
) -> Conversion:
    """Converts a .weights.h5, .keras or .h5 file of keras.applications.

    Args:
      path: the file.
      model: Keras' name or ours, or a network of other sizes.
      num_classes: expected; None: as many as the file has.

    Raises:
      UserError: not readable, or not the weights of that network.
    """
    start = time.monotonic()
    if isinstance(model, str):
        find_source(model, SOURCES)  # a wrong name is told before anything is read
    weights = read_keras_file(path)
    found = weights.tensors["predictions/bias"].size if "predictions/bias" in weights.tensors else 0
    check_classes(found, num_classes, where=path)
    network, image_size, kind = resolve(model, found, SOURCES)
    own = {k: v for k, v in weights.tensors.items() if not k.startswith("normalization")}
    variables = to_variables(own, tensor_names(network), network, where=str(path))
    num_left = len(weights.tensors) - len(own)
    left_out = {**weights.left_out, **({"input normalisation": num_left} if num_left else {})}
    info = default_info(
        network.variant,
        framework="keras",
        file=path,
        sha256=sha256_of(path),
        num_classes=found,
        image_size=image_size,
        preprocessing=kind,
    )
    if num_left:
        info["preprocessing"] = _preprocessing(weights, info)
    return Conversion(
        model=network,
        variables=variables,
        info=info,
        num_read=len(own) + sum(left_out.values()),
        left_out=left_out,
        seconds=time.monotonic() - start,
    )


def _preprocessing(weights: KerasWeights, info: dict[str, Any]) -> dict[str, Any]:
    """What the Rescaling and Normalization layers of a V1 network do, as the weights file says it.

    ImageNet's numbers mean the released weights, made with the official preprocessing. Any other
    numbers mean a network trained with Keras: images squeezed to a square, as it loads them.
    """
    values = {key.split("/")[1]: value for key, value in weights.tensors.items()
              if key.startswith("normalization")}  # fmt: skip
    mean, variance = (np.asarray(values[k], np.float64).ravel() for k in ("mean", "variance"))
    if np.allclose(mean, _IMAGENET_MEAN, atol=1e-4) and (
        np.allclose(variance, _IMAGENET_DEVIATION, atol=1e-4)
        or np.allclose(variance, _IMAGENET_DEVIATION**2, atol=1e-4)
    ):
        return info["preprocessing"]
    deviation = np.sqrt(variance)
    if sum(layer.startswith("rescaling") for layer in weights.layers) > 1:
        deviation = deviation * np.sqrt(_IMAGENET_DEVIATION)
    return {
        **describe("finetune", info["image_size"]),
        "mean": [float(255 * m) for m in mean],
        "std": [float(255 * d) for d in deviation],
    }
