"""How convolutions are computed on each backend: the one table of choices."""

import jax
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")


def _plain(x, kernel, *, stride, padding, groups):
    kernel = kernel.astype(x.dtype)
    if padding != "SAME":
        padding = tuple(tuple(pair) for pair in padding)
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_NHWC, feature_group_count=groups
    )


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding="SAME", implementation="auto"
) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, C, O]."""
    del implementation
    return _plain(x, kernel, stride=stride, padding=padding, groups=1)


def depthwise_conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding="SAME", implementation="auto"
) -> jax.Array:
    """Convolves every channel of x [N, H, W, C] with its own kernel, kernel [k, k, 1, C]."""
    del implementation
    return _plain(x, kernel, stride=stride, padding=padding, groups=x.shape[-1])
