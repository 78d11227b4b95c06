"""timm's names of our variables, and what its networks are.

PyTorch Image Models: timm/models/efficientnet.py (networks and, in default_cfgs, how their weights
are evaluated) and _efficientnet_blocks.py (the blocks). Networks that begin with "tf_" have
TensorFlow's padding and epsilon.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from effv2_jax.convert.layer_names import TORCH, NumberedBlock, name_table
from effv2_jax.convert.mapping import TensorName, from_variables
from effv2_jax.convert.source import Source, TorchConverter, released_blocks
from effv2_jax.models.network import EfficientNet, create_model

_ARCHITECTURE = ("block_specs", "head_channels", "activation", "padding", "bn_epsilon")

# (fused, expands) -> our layer and timm's.
_BLOCKS = {
    (True, False): {"project_conv": "conv", "project_norm": "bn1"},  # ConvBnAct
    (True, True): {  # EdgeResidual
        "expand_conv": "conv_exp",
        "expand_norm": "bn1",
        "project_conv": "conv_pwl",
        "project_norm": "bn2",
    },
    (False, False): {  # DepthwiseSeparableConv
        "depthwise_conv": "conv_dw",
        "depthwise_norm": "bn1",
        "project_conv": "conv_pw",
        "project_norm": "bn2",
    },
    (False, True): {  # InvertedResidual
        "expand_conv": "conv_pw",
        "expand_norm": "bn1",
        "depthwise_conv": "conv_dw",
        "depthwise_norm": "bn2",
        "project_conv": "conv_pwl",
        "project_norm": "bn3",
    },
}
_SQUEEZE = {"se/reduce": "se.conv_reduce", "se/expand": "se.conv_expand"}
_OUTER = {
    "stem/conv": "conv_stem",
    "stem/norm": "bn1",
    "head/conv": "conv_head",
    "head/norm": "bn2",
    "classifier": "classifier",
}


def tensor_names(model: EfficientNet) -> tuple[TensorName, ...]:
    """Names of all variables of a network, ours and timm's."""
    return name_table(model, TORCH, outer=_OUTER, block=_block)


def _block(block: NumberedBlock) -> dict[str, str]:
    layers = _BLOCKS[block.spec.fused, block.spec.expands] | _SQUEEZE
    return {ours: f"blocks.{block.stage}.{block.position}.{name}" for ours, name in layers.items()}


def _v1(name: str, size: int, crop: str, *, tags: str, half: str = "ap_in1k") -> tuple[Source, ...]:
    """EfficientNet; weights with the tag `half` (AdvProp) are normalised by a half."""
    return tuple(
        _tf(f"efficientnet-{name}.{tag}", size, f"{crop}-{'half' if tag == half else 'imagenet'}")
        for tag in tags.split()
    )


def _v2(name: str, size: int, kind: str, *, tags: str) -> tuple[Source, ...]:
    return tuple(_tf(f"efficientnetv2-{name}.{tag}", size, kind) for tag in tags.split())


def _tf(name: str, size: int, kind: str) -> Source:
    model = name.split(".")[0]
    theirs = f"tf_{name.replace('-', '_')}"
    return Source(theirs, model, size, f"pillow-bicubic-{kind}", released_blocks(model))


def _rw(name: str, size: int, *, tag: str) -> Source:
    theirs = f"efficientnetv2_rw_{name}.{tag}"
    return Source(theirs, f"efficientnetv2-rw-{name}", size, "pillow-bicubic-1-imagenet")


_V1_TAGS = "ns_jft_in1k aa_in1k ap_in1k in1k"

# Networks with the tags of their weights, timm's default first: px and kind of the evaluation.
SOURCES: tuple[Source, ...] = (
    *_v2("b0", 224, "0.875-imagenet", tags="in1k"),
    *_v2("b1", 240, "0.882-imagenet", tags="in1k"),
    *_v2("b2", 260, "0.89-imagenet", tags="in1k"),
    *_v2("b3", 300, "squash0.9-half", tags="in21k_ft_in1k"),
    *_v2("b3", 300, "0.904-imagenet", tags="in1k"),
    *_v2("b3", 300, "0.904-half", tags="in21k"),
    *_v2("s", 384, "1-half", tags="in21k_ft_in1k in1k in21k"),
    *_v2("m", 480, "squash1-half", tags="in21k_ft_in1k in1k in21k"),
    *_v2("l", 480, "squash1-half", tags="in21k_ft_in1k in1k in21k"),
    *_v2("xl", 512, "squash1-half", tags="in21k_ft_in1k in21k"),
    *_v1("b0", 224, "0.875", tags=_V1_TAGS),
    *_v1("b1", 240, "0.882", tags=_V1_TAGS),
    *_v1("b2", 260, "0.89", tags=_V1_TAGS),
    *_v1("b3", 300, "0.904", tags=_V1_TAGS),
    *_v1("b4", 380, "0.922", tags=_V1_TAGS),
    *_v1("b5", 456, "0.934", tags=f"{_V1_TAGS} ra_in1k"),
    *_v1("b6", 528, "0.942", tags="ns_jft_in1k aa_in1k ap_in1k"),
    *_v1("b7", 600, "0.949", tags="ns_jft_in1k aa_in1k ap_in1k ra_in1k"),
    *_v1("b8", 672, "0.954", tags="ap_in1k ra_in1k"),
    *_v1("l2", 475, "0.936", tags="ns_jft_in1k_475"),
    *_v1("l2", 800, "0.96", tags="ns_jft_in1k"),
    _rw("t", 288, tag="ra2_in1k"),
    _rw("s", 384, tag="ra2_in1k"),
    _rw("m", 416, tag="agc_in1k"),
)


convert = TorchConverter(
    framework="timm", sources=SOURCES, names=tensor_names, classifier="classifier"
)


def export(model: EfficientNet, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns our variables as timm's state dict; `convert` gives exactly them again."""
    return from_variables(variables, tensor_names(model))


def timm_name(model: EfficientNet) -> str | None:
    """Returns timm's name of a network, or None if it has none of that architecture."""
    for source in SOURCES:
        if source.model != model.variant:
            continue
        theirs = create_model(source.model, model.num_classes, **source.overrides)
        if all(getattr(model, key) == getattr(theirs, key) for key in _ARCHITECTURE):
            return source.name.split(".")[0]
    return None
