"""How other frameworks call the tensors of a layer, and how a table of names is put together.

names_keras.py, names_timm.py and names_torchvision.py say how the layers are called; that a norm
has four tensors, and in which order the layers of a block come, is here.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from effv2_jax.convert.mapping import TensorName
from effv2_jax.models.block_spec import BlockSpec, round_repeats
from effv2_jax.models.network import EfficientNet


@dataclasses.dataclass(frozen=True)
class Style:
    """A framework's names of the tensors of a layer, and the transforms of its kernels.

    Attributes:
      separator: between a layer and its tensor.
      norm: scale, bias, mean, variance.
      kernel: of a convolution or dense layer.
      bias: of the same.
      conv: key of `mapping.TRANSFORMS`.
      depthwise: the same.
      dense: the same.
    """

    separator: str
    norm: tuple[str, str, str, str]
    kernel: str
    bias: str
    conv: str
    depthwise: str
    dense: str


TORCH = Style(
    ".", ("weight", "bias", "running_mean", "running_var"), "weight", "bias",
    "conv_torch", "depthwise_torch", "linear_torch",
)  # fmt: skip
KERAS = Style(
    "/", ("gamma", "beta", "moving_mean", "moving_variance"), "kernel", "bias",
    "same", "depthwise_tf", "same",
)  # fmt: skip

_NORM = (("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var"))


@dataclasses.dataclass(frozen=True)
class NumberedBlock:
    """A block of a network and where it stands.

    Attributes:
      stage: index of its row, from 0.
      position: index within the row, from 0.
      spec: the block, scaled.
    """

    stage: int
    position: int
    spec: BlockSpec


# Block -> our layer's name -> theirs, without the tensor's.
BlockLayers = Callable[[NumberedBlock], Mapping[str, str]]


def numbered_blocks(model: EfficientNet) -> tuple[NumberedBlock, ...]:
    """Returns the blocks of a network in order."""
    places = [
        (stage, position)
        for stage, row in enumerate(model.blocks)
        for position in range(round_repeats(row.repeats, model.depth))
    ]
    return tuple(
        NumberedBlock(stage, position, spec)
        for (stage, position), spec in zip(places, model.block_specs, strict=True)
    )


def block_layers(spec: BlockSpec) -> tuple[str, ...]:
    """Returns our names of the layers of a block, in the order in which they are applied."""
    return (
        *(("expand_conv", "expand_norm") if spec.expands else ()),
        *(() if spec.fused else ("depthwise_conv", "depthwise_norm")),
        *(("se/reduce", "se/expand") if spec.se_channels else ()),
        "project_conv",
        "project_norm",
    )


def name_table(
    model: EfficientNet, style: Style, *, outer: Mapping[str, str], block: BlockLayers
) -> tuple[TensorName, ...]:
    """Returns the names of all variables of a network.

    Args:
      model: the network.
      style: of the framework.
      outer: "stem/conv", "stem/norm", "head/conv", "head/norm", "classifier" -> theirs.
      block: the same of a block, by `block_layers`.
    """
    rows = [*_rows(style, "stem/conv", outer), *_rows(style, "stem/norm", outer)]
    for index, numbered in enumerate(numbered_blocks(model)):
        theirs = block(numbered)
        for layer in block_layers(numbered.spec):
            rows += _rows(
                style, f"blocks_{index}/{layer}", {f"blocks_{index}/{layer}": theirs[layer]}
            )
    rows += [*_rows(style, "head/conv", outer), *_rows(style, "head/norm", outer)]
    if model.num_classes:
        rows += _rows(style, "classifier", outer)
    return tuple(rows)


def _rows(style: Style, layer: str, theirs: Mapping[str, str]) -> Iterator[TensorName]:
    prefix = theirs[layer] + style.separator
    kind = layer.split("/")[-1]
    if kind in ("norm", "expand_norm", "depthwise_norm", "project_norm"):
        for (collection, leaf), name in zip(_NORM, style.norm, strict=True):
            yield TensorName(f"{collection}/{layer}/{leaf}", prefix + name)
        return
    transform = {"depthwise_conv": style.depthwise, "classifier": style.dense}.get(kind, style.conv)
    yield TensorName(f"params/{layer}/kernel", prefix + style.kernel, transform)
    if kind in ("reduce", "expand", "classifier"):
        yield TensorName(f"params/{layer}/bias", prefix + style.bias)
