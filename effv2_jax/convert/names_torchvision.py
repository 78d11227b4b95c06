"""torchvision's names of our variables, and what its networks are.

torchvision/models/efficientnet.py: `features` is a list (stem, one entry per stage, head), a block
is a list of convolution-and-norm pairs with the squeeze-and-excite (fc1, fc2) among them.
"""

from effv2_jax.convert.layer_names import TORCH, NumberedBlock, block_layers, name_table
from effv2_jax.convert.mapping import TensorName
from effv2_jax.convert.source import Source, TorchConverter, released_blocks
from effv2_jax.models.network import EfficientNet


def _source(
    name: str, size: int, *, resize: str, epsilon: float = 1e-3, momentum: float = 0.9
) -> Source:
    """Momentum is the old statistics' weight; PyTorch's (0.1, 0.01) is that of the new ones."""
    model = f"efficientnetv2-{name[3:]}" if name.startswith("v2_") else f"efficientnet-{name}"
    overrides = {"padding": "SYMMETRIC", "bn_epsilon": epsilon, "bn_momentum": momentum}
    overrides |= released_blocks(model)
    return Source(f"efficientnet_{name}", model, size, f"pillow-{resize}", overrides)


# Sizes, resizing and normalisation: the transforms of the default weights of each
# (EfficientNet_B0_Weights.DEFAULT ...). Epsilon and momentum: the norm_layer of each function.
SOURCES: tuple[Source, ...] = (
    _source("b0", 224, resize="bicubic-0.875-imagenet", epsilon=1e-5),
    _source("b1", 240, resize="bilinear-0.941176-imagenet", epsilon=1e-5),  # to 255 px
    _source("b2", 288, resize="bicubic-1-imagenet", epsilon=1e-5),
    _source("b3", 300, resize="bicubic-0.9375-imagenet", epsilon=1e-5),
    _source("b4", 380, resize="bicubic-0.989583-imagenet", epsilon=1e-5),  # to 384 px
    _source("b5", 456, resize="bicubic-1-imagenet", momentum=0.99),
    _source("b6", 528, resize="bicubic-1-imagenet", momentum=0.99),
    _source("b7", 600, resize="bicubic-1-imagenet", momentum=0.99),
    _source("v2_s", 384, resize="bilinear-1-imagenet"),
    _source("v2_m", 480, resize="bilinear-1-imagenet"),
    _source("v2_l", 480, resize="bicubic-1-half"),
)


def tensor_names(model: EfficientNet) -> tuple[TensorName, ...]:
    """Names of all variables of a network, ours and torchvision's."""
    last = len(model.blocks) + 1
    outer = {
        "stem/conv": "features.0.0",
        "stem/norm": "features.0.1",
        "head/conv": f"features.{last}.0",
        "head/norm": f"features.{last}.1",
        "classifier": "classifier.1",
    }
    return name_table(model, TORCH, outer=outer, block=_block)


def _block(block: NumberedBlock) -> dict[str, str]:
    prefix = f"features.{block.stage + 1}.{block.position}.block"
    out, index = {}, -1
    for layer in block_layers(block.spec):
        if layer.endswith("_conv") or layer == "se/reduce":
            index += 1  # the next entry of the list
        part = {"se/reduce": "fc1", "se/expand": "fc2"}.get(layer, int(layer.endswith("_norm")))
        out[layer] = f"{prefix}.{index}.{part}"
    return out


convert = TorchConverter(
    framework="torchvision", sources=SOURCES, names=tensor_names, classifier="classifier.1"
)
