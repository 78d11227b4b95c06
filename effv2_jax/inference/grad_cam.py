"""Grad-CAM: where in a picture the evidence for a class was found.

Selvaraju et al. 2017 (arXiv:1610.02391), section 3: the feature maps A_k of a layer are weighted by
the mean of the gradient of the class's logit y over their positions, summed, and what speaks
against the class is cut off:

    a_k = mean over positions of dy / dA_k        map = relu(sum over k of a_k A_k)

The gradient is taken with respect to a tensor of zeros that is added to the layer's output while
the network is applied; the network itself knows nothing of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effv2_jax.config import nearest
from effv2_jax.data.kinds import Kind
from effv2_jax.errors import UserError
from effv2_jax.inference.forward import BatchProgram, normalize
from effv2_jax.models.network import EfficientNet

DEFAULT_LAYER = "head_1x1"  # the last feature maps, which the classifier sees the mean of


def layers(model: EfficientNet) -> dict[str, str]:
    """Returns the endpoints that have a Grad-CAM -> the module whose output they are."""
    modules = {"stem": "stem"}
    specs = model.block_specs
    reductions = 0
    for i in range(len(specs)):
        modules[f"block_{i}"] = f"blocks_{i}"
        if i + 1 == len(specs) or specs[i + 1].stride > 1:
            reductions += 1
            modules[f"reduction_{reductions}"] = f"blocks_{i}"
    return {**modules, "features": f"blocks_{len(specs) - 1}", "head_1x1": "head"}


def check_layer(model: EfficientNet, layer: str) -> str:
    """Returns the module whose output the layer is.

    Raises:
        UserError: there is no such layer.
    """
    known = layers(model)
    if layer not in known:
        raise UserError(
            f"layer {layer!r}: {model.variant} has none of this name{nearest(layer, known)}; it "
            f"has {', '.join(known)}"
        )
    return known[layer]


def grad_cam(
    model: EfficientNet,
    variables: Mapping[str, Any],
    images: jax.Array,
    classes: jax.Array,
    *,
    layer: str = DEFAULT_LAYER,
) -> jax.Array:
    """Computes the maps.

    Args:
        model: the network.
        variables: {"params", "batch_stats"}.
        images: [N, H, W, 3], normalised.
        classes: int32 [N], the output whose evidence is looked for.
        layer: one of `layers(model)`.

    Returns:
        float32 [N, h, w], not negative, of the layer's resolution.

    Raises:
        UserError: there is no such layer.
    """
    module = check_layer(model, layer)

    def logits(added: jax.Array) -> tuple[jax.Array, jax.Array]:
        with nn.intercept_methods(_adding(module, added)):
            outputs, ends = model.apply(variables, images, endpoints=True)
        # Examples do not depend on each other, so one gradient of the sum is that of all.
        return jnp.sum(jnp.take_along_axis(outputs, classes[:, None], -1)), ends[layer]

    shape = jax.eval_shape(lambda: model.apply(variables, images, endpoints=True)[1][layer])
    gradient, maps = jax.grad(logits, has_aux=True)(jnp.zeros(shape.shape, shape.dtype))
    weights = jnp.mean(gradient.astype(jnp.float32), (1, 2), keepdims=True)
    return jax.nn.relu(jnp.sum(weights * maps.astype(jnp.float32), -1))


def _adding(module: str, added: jax.Array) -> Callable[..., Any]:
    """Adds a tensor to the output of a module of the network; the first output if it has two."""

    def intercept(
        function: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], context: Any
    ) -> Any:
        output = function(*args, **kwargs)
        if context.module.path != (module,) or context.method_name != "__call__":
            return output
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    return intercept


def heat_maps(
    model: EfficientNet,
    variables: Mapping[str, Any],
    *,
    kind: Kind,
    layer: str,
    batch_size: int,
) -> BatchProgram:
    """Makes the program (images, classes) -> maps; see `grad_cam` and `BatchProgram`.

    Args:
        model: the network.
        variables: {"params", "batch_stats"}.
        kind: of preprocessing: its normalisation is part of the program.
        layer: one of `layers(model)`.
        batch_size: images [batch size, S, S, 3] in 0..255, classes int32 [batch size].
    """

    def maps(variables: Mapping[str, Any], images: jax.Array, classes: jax.Array) -> jax.Array:
        return grad_cam(model, variables, normalize(images, kind), classes, layer=layer)

    return BatchProgram(maps, variables, batch_size=batch_size)
