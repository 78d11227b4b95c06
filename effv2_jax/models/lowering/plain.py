"""The definitions: XLA's own convolutions, differentiated by JAX."""

import jax
from jax import lax

from effv2_jax.models.lowering.geometry import Geometry

NHWC = ("NHWC", "HWIO", "NHWC")


def _convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry, groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        geometry.strides,
        geometry.padding,
        dimension_numbers=NHWC,
        feature_group_count=groups,
    )


def dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Dense convolution of x [N, H, W, C] with kernel [k, k, C, O]: [N, H', W', O]."""
    return _convolve(x, kernel, geometry, 1)


def depthwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Depthwise convolution of x [N, H, W, C] with kernel [k, k, 1, C]: [N, H', W', C]."""
    return _convolve(x, kernel, geometry, x.shape[3])
