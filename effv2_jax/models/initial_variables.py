"""The variables that a training begins with, drawn on the host."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from effv2_jax.models import layers
from effv2_jax.models.network import EfficientNet

Array = jax.Array


def init_variables(model: EfficientNet, seed: int, image_size: int = 32) -> dict[str, dict]:
    """Draws initial variables tensor by tensor with NumPy: 20 times faster than a jitted init.

    The distributions are those of `model.init`, the numbers are not. Each
    tensor depends on the seed and its own path only.

    Args:
      model: the network.
      seed: any non-negative integer.
      image_size: side of the images that only shape inference sees.

    Returns:
      {"params": ..., "batch_stats": ...} of float32 jax arrays.
    """
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        names = [entry.key for entry in path]
        return jax.device_put(_initial_value(names, leaf.shape, seed, model))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _initial_value(
    names: list[str], shape: tuple[int, ...], seed: int, model: EfficientNet
) -> np.ndarray:
    """The initial value of the variable with this path, float32."""
    leaf, module = names[-1], names[-2]
    if leaf in ("scale", "var"):
        return np.ones(shape, np.float32)
    if leaf != "kernel":
        return np.full(shape, model.head_bias if module == "classifier" else 0, np.float32)
    layer = {"classifier": "classifier", "depthwise_conv": "depthwise"}.get(module, "conv")
    distribution, scale = layers.initial_kernel(layer, shape, model.initializer)
    digest = hashlib.sha256("/".join(names).encode()).digest()[:8]
    rng = np.random.default_rng([seed, int.from_bytes(digest, "little")])
    if distribution == "uniform":
        return rng.uniform(-scale, scale, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(scale)
