"""The official TensorFlow names of our variables, as a table.

Official names are written without the leading "<model name>/", as the variables of a released
checkpoint are called below it: "blocks_3/conv2d/kernel". Ours are the paths of the variable tree
joined with "/": "params/blocks_3/expand_conv/kernel".

Keras numbers the layers of a block in the order in which they are built, so that the same name
means different things in different kinds of block; `_BLOCK_LAYERS` says which.
"""

from collections.abc import Sequence

from effv2_jax.convert.mapping import TensorName
from effv2_jax.models.block_spec import BlockSpec

# (fused, expands) -> our layer and its official name, in the order of creation.
_BLOCK_LAYERS = {
    (False, True): (
        ("expand_conv", "conv2d"),
        ("expand_norm", "tpu_batch_normalization"),
        ("depthwise_conv", "depthwise_conv2d"),
        ("depthwise_norm", "tpu_batch_normalization_1"),
        ("se/reduce", "se/conv2d"),
        ("se/expand", "se/conv2d_1"),
        ("project_conv", "conv2d_1"),
        ("project_norm", "tpu_batch_normalization_2"),
    ),
    (False, False): (
        ("depthwise_conv", "depthwise_conv2d"),
        ("depthwise_norm", "tpu_batch_normalization"),
        ("se/reduce", "se/conv2d"),
        ("se/expand", "se/conv2d_1"),
        ("project_conv", "conv2d"),
        ("project_norm", "tpu_batch_normalization_1"),
    ),
    (True, True): (
        ("expand_conv", "conv2d"),
        ("expand_norm", "tpu_batch_normalization"),
        ("se/reduce", "se/conv2d"),
        ("se/expand", "se/conv2d_1"),
        ("project_conv", "conv2d_1"),
        ("project_norm", "tpu_batch_normalization_1"),
    ),
    (True, False): (
        ("se/reduce", "se/conv2d"),
        ("se/expand", "se/conv2d_1"),
        ("project_conv", "conv2d"),
        ("project_norm", "tpu_batch_normalization"),
    ),
}

_CONV_AND_NORM = (("conv", "conv2d"), ("norm", "tpu_batch_normalization"))  # stem and head

# our leaf -> collection, official leaf
_NORM_LEAVES = (
    ("params", "scale", "gamma"),
    ("params", "bias", "beta"),
    ("batch_stats", "mean", "moving_mean"),
    ("batch_stats", "var", "moving_variance"),
)


def layer_names(module: str, layer: str, official: str) -> tuple[TensorName, ...]:
    """Names of the variables of one layer, e.g. ("blocks_3", "expand_norm", "tpu_batch_...")."""
    if layer.endswith("norm"):
        leaves = _NORM_LEAVES
    elif layer == "depthwise_conv":
        leaves = (("params", "kernel", "depthwise_kernel"),)
    elif layer.startswith("se/"):
        leaves = (("params", "kernel", "kernel"), ("params", "bias", "bias"))
    else:
        leaves = (("params", "kernel", "kernel"),)
    transform = "depthwise_tf" if layer == "depthwise_conv" else "same"
    return tuple(
        TensorName(
            f"{collection}/{module}/{layer}/{ours}", f"{module}/{official}/{theirs}", transform
        )
        for collection, ours, theirs in leaves
    )


def stem_names() -> tuple[TensorName, ...]:
    """Names of the stem's variables."""
    return tuple(n for ours, tf in _CONV_AND_NORM for n in layer_names("stem", ours, tf))


def block_names(module: str, spec: BlockSpec) -> tuple[TensorName, ...]:
    """Names of one block's variables; `module` is "blocks_<index>"."""
    return tuple(
        name
        for ours, tf in _BLOCK_LAYERS[spec.fused, spec.expand > 1]
        if spec.se_channels or not ours.startswith("se/")
        for name in layer_names(module, ours, tf)
    )


def head_names() -> tuple[TensorName, ...]:
    """Names of the head's variables, without the classifier."""
    return tuple(n for ours, tf in _CONV_AND_NORM for n in layer_names("head", ours, tf))


def classifier_names() -> tuple[TensorName, ...]:
    """Names of the classifier's variables; a fresh TF1 graph calls it "head_1/dense"."""
    return (
        TensorName("params/classifier/kernel", "head/dense/kernel"),
        TensorName("params/classifier/bias", "head/dense/bias"),
    )


def tensor_names(blocks: Sequence[BlockSpec], *, num_classes: int = 1000) -> tuple[TensorName, ...]:
    """Names of all variables of a network, in TensorFlow's order of creation.

    Args:
      blocks: one entry per block (`expand_blocks`), not rows with repeats.
      num_classes: 0 leaves the classifier out.
    """
    return (
        *stem_names(),
        *(n for i, spec in enumerate(blocks) for n in block_names(f"blocks_{i}", spec)),
        *head_names(),
        *(classifier_names() if num_classes else ()),
    )
