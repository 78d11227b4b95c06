"""Operations and least bytes of a network's steps, counted layer by layer.

The bytes are those that remain when every convolution is one kernel and everything else rides
along: norms, activations, the gate and the sums of a block are computed where values are read or
written anyway. What BatchNorm then still asks for in training is that a convolution's output is
written, and read again once its statistics are known. With I and O the bytes of a convolution's
input and output, for one image:

    inference                    I + O; the shortcut of a block is read once more
    training, forward            I + O
      squeeze-excite             + O   the pooling waits for the statistics
      shortcut                   + 2 O the shortcut is read, the sum is written for the next block
      head                       + O   likewise
    training, backward           3 O + 2 I: the output, for the norm's two sums; output, gradient
                                 and input, for the two products; the input's gradient, written
      squeeze-excite             + 2 O the norm's sums wait for the gate's gradient
      shortcut                   + I   its gradient is added
      stem                       - I   pictures need no gradient
      head                       - O   the gradient of its pooling is one number a channel

Parameters are float32: 4 bytes each in inference; 24 in a training step with plain SGD (read in
both passes, gradient written and read, read and written by the update).
"""

import dataclasses
from collections.abc import Iterable, Iterator

from effv2_jax.models.block_spec import BlockSpec, expand_blocks, round_channels
from effv2_jax.models.summary import Network

ITEMSIZE = {"float32": 4, "bfloat16": 2}

# A training step multiplies three times as much as a forward pass: the values, and the gradients
# with respect to inputs and to weights.
TRAINING_FACTOR = 3

_WEIGHT_BYTES = {"infer": 4, "train": 24}
_PICTURE_BYTES = 1  # pictures come as uint8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution with what rides along; sizes are of one image, in elements.

    Attributes:
        stage: as in `models.summary`.
        block: number of the block, None outside.
        kind: stem, dense, pointwise, depthwise, head or classifier.
        inputs: elements read.
        outputs: elements written.
        side: of the outputs, in pixels.
        features: channels of the outputs.
        weights: parameters, those of the norm and of the gate too.
        multiply_adds: of a forward pass.
        gated: whether squeeze-excite follows.
        shortcut: whether the block's shortcut is added to the output.
        first: whether it is the first of a block with a shortcut.
    """

    stage: str
    block: int | None = None
    kind: str
    inputs: int
    outputs: int
    side: int
    features: int
    weights: int
    multiply_adds: int
    gated: bool = False
    shortcut: bool = False
    first: bool = False

    def operations(self, mode: str) -> int:
        """Operations for one image; a multiply-add is two."""
        return 2 * self.multiply_adds * (TRAINING_FACTOR if mode == "train" else 1)

    def bytes(self, mode: str, *, dtype: str, batch: int) -> float:
        """Least bytes for one image; see the module's text."""
        size = ITEMSIZE[dtype]
        read = self.inputs * (_PICTURE_BYTES if self.kind == "stem" else size)
        written = self.outputs * size
        weights = self.weights * _WEIGHT_BYTES[mode] / batch
        if self.kind == "classifier":
            return weights
        if mode == "infer":
            return read + written + (written if self.shortcut else 0) + weights
        total = (read + written) + (3 * written + 2 * read)
        total += 3 * written * self.gated + 2 * written * self.shortcut + read * self.first
        # The head's pooling: one more pass forward, and one less backward.
        return total - (read if self.kind == "stem" else 0) + weights


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time of a layer, and what it is spent on.

    Attributes:
        seconds: for one image.
        by: "matmul" or "copy", whichever takes longer.
    """

    seconds: float
    by: str


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine reaches: operations a second, and bytes a second read and written."""

    matmul_flops: float
    copy_bytes: float

    def bound(self, layer: Layer, mode: str, *, dtype: str, batch: int) -> Bound:
        """The roofline of a layer: it takes as long as the slower of its two needs."""
        arithmetic = layer.operations(mode) / self.matmul_flops
        traffic = layer.bytes(mode, dtype=dtype, batch=batch) / self.copy_bytes
        return Bound(max(arithmetic, traffic), "matmul" if arithmetic >= traffic else "copy")


def count_layers(
    network: Network, *, image_size: int, num_classes: int = 1000
) -> tuple[Layer, ...]:
    """Returns the layers of a network in order.

    Args:
        network: a `Variant`, or an `EfficientNet` with its overrides.
        image_size: side of the square input in pixels.
        num_classes: outputs.
    """
    return tuple(_layers(network, image_size, num_classes))


def _layers(network: Network, size: int, num_classes: int) -> Iterator[Layer]:
    channels = round_channels(network.blocks[0].in_channels, network.width)
    half = -(-size // 2)
    yield _convolution("stem", None, "stem", 3, 3, channels, size, half)
    size, number = half, 0
    for i, row in enumerate(network.blocks):
        for spec in expand_blocks([row], width=network.width, depth=network.depth):
            yield from _block(str(i + 1), number, spec, size)
            size, channels, number = -(-size // spec.stride), spec.channels, number + 1
    features = round_channels(network.feature_size, network.width)
    yield _convolution("head", None, "head", 1, channels, features, size, size)
    yield Layer(
        stage="classifier",
        kind="classifier",
        inputs=features,
        outputs=num_classes,
        side=1,
        features=num_classes,
        weights=features * num_classes + num_classes,
        multiply_adds=features * num_classes,
    )


def _block(stage: str, number: int, spec: BlockSpec, size: int) -> Iterator[Layer]:
    after = -(-size // spec.stride)
    inner, squeezed = spec.inner_channels, spec.se_channels
    residual = spec.has_residual
    gate = {"gated": bool(squeezed)}
    # Two 1x1 convolutions with bias on one pixel.
    gate_weights = 2 * inner * squeezed + inner + squeezed if squeezed else 0
    gate_work = 2 * inner * squeezed

    if spec.fused and not spec.expands:
        # Squeeze-excite, which the released networks do not have here, comes before it.
        only = _convolution(
            stage, number, "dense", spec.kernel, inner, spec.channels, size, after,
            shortcut=residual,
        )  # fmt: skip
        yield dataclasses.replace(
            only,
            first=residual,
            weights=only.weights + gate_weights,
            multiply_adds=only.multiply_adds + gate_work,
            **gate,
        )
        return
    if spec.fused:
        dense = _convolution(
            stage, number, "dense", spec.kernel, spec.in_channels, inner, size, after
        )
        layers = [dense]
    else:
        layers = []
        if spec.expands:
            expansion = _convolution(
                stage, number, "pointwise", 1, spec.in_channels, inner, size, size
            )
            layers.append(expansion)
        layers.append(_convolution(stage, number, "depthwise", spec.kernel, 1, inner, size, after))
    last = layers[-1]
    layers[-1] = dataclasses.replace(
        last,
        weights=last.weights + gate_weights,
        multiply_adds=last.multiply_adds + gate_work,
        **gate,
    )
    layers[0] = dataclasses.replace(layers[0], first=residual)
    yield from layers
    yield _convolution(
        stage, number, "pointwise", 1, inner, spec.channels, after, after, shortcut=residual
    )


def _convolution(
    stage: str,
    block: int | None,
    kind: str,
    kernel: int,
    fan_in: int,
    features: int,
    before: int,
    after: int,
    *,
    shortcut: bool = False,
) -> Layer:
    """A convolution and its norm; `fan_in` is 1 for a depthwise one."""
    channels = features if kind == "depthwise" else fan_in
    weights = kernel * kernel * fan_in * features
    return Layer(
        stage=stage,
        block=block,
        kind=kind,
        inputs=before * before * channels,
        outputs=after * after * features,
        side=after,
        features=features,
        weights=weights + 2 * features,
        multiply_adds=weights * after * after,
        shortcut=shortcut,
    )


def total(layers: Iterable[Layer], mode: str, *, dtype: str, batch: int) -> tuple[float, float]:
    """Returns (operations, least bytes) for one image."""
    layers = tuple(layers)
    return (
        float(sum(layer.operations(mode) for layer in layers)),
        sum(layer.bytes(mode, dtype=dtype, batch=batch) for layer in layers),
    )
