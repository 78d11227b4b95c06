"""Channel parallelism: how the state lies on devices that divide late blocks by their channels.

The network computes it (`EfficientNet.channel_parallel`); here is which networks and devices do,
and what follows for the state: a device holds only its part of the parameters that belong to inner
channels, of their moving statistics, optimizer slots and averages. Seen from outside all arrays
are whole, so checkpoints and weights are the same for any number of devices. Tensor parallelism of
Megatron-LM (arXiv:1909.08053, section 3), over the devices that share the examples elsewhere.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effv2_jax.models import lowering
from effv2_jax.models.network import EfficientNet
from effv2_jax.training import optimizers
from effv2_jax.training.mesh import AXIS, replicated

# Variables with one value, column or row per inner channel -> the dimension of these. Slots and
# averages have the paths of their variables at the end of their own.
_DIVIDED = {
    re.compile(rf"(?:.*/)?blocks_(\d+)/(?:{names})"): dimension
    for names, dimension in (
        (r"(?:expand_conv|expand_norm|depthwise_conv|depthwise_norm|se/expand)/\w+", -1),
        (r"(?:project_conv|se/reduce)/kernel", -2),
    )
}


def for_mesh(model: EfficientNet, mesh: Mesh) -> EfficientNet:
    """Returns the network as the steps over a mesh use it: it knows the axis and its own part.

    Channels are divided where the lowering wants it (`Lowering.channel_parallel_pixels`), norms are
    over all images, and the devices share one memory.

    Args:
      model: the network as it is saved.
      mesh: one axis, "data".
    """
    wanted = lowering.choose(model.lowering).channel_parallel_pixels > 0
    together = len({device.process_index for device in mesh.devices.flat}) == 1
    divides = wanted and together and not model.bn_group_size
    return model.clone(axis_name=AXIS, channel_parallel=mesh.size if divides else 1)


def partition_specs(tree: Any, blocks: range) -> Any:
    """Returns how variables, or a state with them, are divided over the devices of the mesh.

    Args:
      tree: of arrays or shapes.
      blocks: that are divided (`EfficientNet.channel_parallel_blocks`).

    Returns:
      A tree of `PartitionSpec`.
    """

    def spec(path: jax.tree_util.KeyPath, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, dimension in _DIVIDED.items():
            match = pattern.fullmatch(name)
            if match and int(match[1]) in blocks:
                axes = [None] * leaf.ndim
                axes[dimension] = AXIS
                return PartitionSpec(*axes)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, blocks: range, mesh: Mesh) -> Any:
    """Returns `partition_specs` as shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, blocks))


def move(tree: Any, targets: Any) -> Any:
    """Returns a state with its arrays where the next stage wants them.

    Args:
      tree: of arrays; those that lie elsewhere are deleted, as a step's donated ones are.
      targets: tree of shardings.
    """

    def place(leaf: jax.Array, target: NamedSharding) -> jax.Array:
        if leaf.sharding.is_equivalent_to(target, leaf.ndim):
            return leaf
        moved = jax.device_put(leaf, target)
        leaf.delete()
        return moved

    return jax.tree.map(place, tree, targets)


def whole(tree: Any, mesh: Mesh) -> Any:
    """Returns the arrays with all values on every device, as evaluation reads them."""
    return jax.tree.map(
        lambda leaf: leaf if leaf.is_fully_replicated else jax.device_put(leaf, replicated(mesh)),
        tree,
    )


def is_divided(tree: Any, blocks: range) -> Any:
    """Returns a tree of bool: whether a device has only a part of a variable."""
    return jax.tree.map(lambda spec: AXIS in spec, partition_specs(tree, blocks))


def squared_norms(tree: Any, blocks: range) -> Any:
    """Returns the sum of squares of every array, all parts of it; inside `jax.shard_map`.

    Args:
      tree: parameters or their gradients, parts of those that are divided.
      blocks: that are divided.

    Returns:
      A tree of float32 scalars.
    """
    squares, divided = optimizers.squared_norms(tree), is_divided(tree, blocks)
    pairs = zip(jax.tree.leaves(squares), jax.tree.leaves(divided), strict=True)
    parts = [square for square, own in pairs if own]
    if not parts:
        return squares
    totals = iter(jax.lax.psum(jnp.stack(parts), AXIS))  # one meeting for all
    return jax.tree.map(lambda square, own: next(totals) if own else square, squares, divided)
