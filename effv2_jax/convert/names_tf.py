"""The official TensorFlow names of our variables, as a table.

Official names are written without the leading "<model name>/", as the variables of a released
checkpoint are called below it: "blocks_3/conv2d/kernel". Ours are the paths of the variable tree
joined with "/": "params/blocks_3/expand_conv/kernel".

Checkpoints of the object-based kind name variables by Python attributes instead (`object_paths`).

Keras numbers the layers of a block in the order in which they are built, so that the same name
means different things in different kinds of block; `_BLOCK_LAYERS` says which.
"""

from collections.abc import Collection, Sequence

from effv2_jax.convert.mapping import TensorName
from effv2_jax.models.block_spec import BlockSpec

# (fused, expands) -> our layer, its official name, and the attribute of the official object, in the
# order of creation.
_BLOCK_LAYERS = {
    (False, True): (
        ("expand_conv", "conv2d", "_expand_conv"),
        ("expand_norm", "tpu_batch_normalization", "_norm0"),
        ("depthwise_conv", "depthwise_conv2d", "_depthwise_conv"),
        ("depthwise_norm", "tpu_batch_normalization_1", "_norm1"),
        ("se/reduce", "se/conv2d", "_se/_se_reduce"),
        ("se/expand", "se/conv2d_1", "_se/_se_expand"),
        ("project_conv", "conv2d_1", "_project_conv"),
        ("project_norm", "tpu_batch_normalization_2", "_norm2"),
    ),
    (False, False): (
        ("depthwise_conv", "depthwise_conv2d", "_depthwise_conv"),
        ("depthwise_norm", "tpu_batch_normalization", "_norm1"),
        ("se/reduce", "se/conv2d", "_se/_se_reduce"),
        ("se/expand", "se/conv2d_1", "_se/_se_expand"),
        ("project_conv", "conv2d", "_project_conv"),
        ("project_norm", "tpu_batch_normalization_1", "_norm2"),
    ),
    (True, True): (
        ("expand_conv", "conv2d", "_expand_conv"),
        ("expand_norm", "tpu_batch_normalization", "_norm0"),
        ("se/reduce", "se/conv2d", "_se/_se_reduce"),
        ("se/expand", "se/conv2d_1", "_se/_se_expand"),
        ("project_conv", "conv2d_1", "_project_conv"),
        ("project_norm", "tpu_batch_normalization_1", "_norm1"),
    ),
    (True, False): (
        ("se/reduce", "se/conv2d", "_se/_se_reduce"),
        ("se/expand", "se/conv2d_1", "_se/_se_expand"),
        ("project_conv", "conv2d", "_project_conv"),
        ("project_norm", "tpu_batch_normalization", "_norm1"),
    ),
}


_STEM_LAYERS = (("conv", "conv2d", "_conv_stem"), ("norm", "tpu_batch_normalization", "_norm"))
_HEAD_LAYERS = (("conv", "conv2d", "_conv_head"), ("norm", "tpu_batch_normalization", "_norm"))

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


def _block_layers(*, fused: bool, expands: bool, se: bool) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        layer for layer in _BLOCK_LAYERS[fused, expands] if se or not layer[0].startswith("se/")
    )


def stem_names() -> tuple[TensorName, ...]:
    """Names of the stem's variables."""
    return tuple(n for ours, tf, _ in _STEM_LAYERS for n in layer_names("stem", ours, tf))


def block_names(module: str, spec: BlockSpec) -> tuple[TensorName, ...]:
    """Names of one block's variables; `module` is "blocks_<index>"."""
    return tuple(
        name
        for ours, tf, _ in _block_layers(
            fused=spec.fused, expands=spec.expands, se=bool(spec.se_channels)
        )
        for name in layer_names(module, ours, tf)
    )


def head_names() -> tuple[TensorName, ...]:
    """Names of the head's variables, without the classifier."""
    return tuple(n for ours, tf, _ in _HEAD_LAYERS for n in layer_names("head", ours, tf))


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


def object_paths(blocks: Sequence[Collection[str]]) -> dict[str, str]:
    """Where a Keras object keeps its variables: path of attributes -> official name.

    Checkpoints written by Keras (`save_weights`) name variables by the attributes of the official
    classes: "_blocks/3/_expand_conv/kernel".

    Args:
      blocks: the attributes that each block's object has; they tell which kind of block it is.
    """
    parts = [("stem", "_stem", _STEM_LAYERS), ("head", "_head", _HEAD_LAYERS)]
    for i, has in enumerate(blocks):
        layers = _block_layers(
            fused="_depthwise_conv" not in has, expands="_expand_conv" in has, se="_se" in has
        )
        parts.append((f"blocks_{i}", f"_blocks/{i}", layers))
    paths = {
        f"{holder}/{attribute}/{_leaf(name)}": name.theirs
        for module, holder, layers in parts
        for ours, official, attribute in layers
        for name in layer_names(module, ours, official)
    }
    return paths | {f"_fc/{_leaf(name)}": name.theirs for name in classifier_names()}


def _leaf(name: TensorName) -> str:
    return name.theirs.rpartition("/")[2]
