"""The layers of the networks: what convolution, activation, dropout and drop path mean.

Parameters and moving statistics are float32; `dtype` is the type of maps. Convolution kernels are
[k, k, in, out], depthwise kernels [k, k, 1, channels] (TensorFlow's are [k, k, channels, 1]).
How convolutions are computed on a backend is the business of the package `lowering`.
"""

import difflib
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.errors import UserError
from effv2_jax.models import lowering

Array = jax.Array
Activation = Callable[[Array], Array]


def _leaky_relu(x: Array) -> Array:
    """TensorFlow's slope 0.2, and its gradient 0.2 at 0 (1 in jax.nn.leaky_relu)."""
    return jnp.where(x > 0, x, 0.2 * x)


def _selu(x: Array) -> Array:
    """With TensorFlow's gradient at 0, that of the linear side (jax.nn.selu: of the other)."""
    alpha, scale = 1.6732632423543772, 1.0507009873554805  # arXiv:1706.02515
    return scale * jnp.where(x >= 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))


# Official: utils.py, activation_fn. "gelu" is an addition (the exact form, with erf).
ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "silu_native": jax.nn.silu,
    "hswish": lambda x: x * jax.nn.relu6(x + 3) / 6,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "elu": jax.nn.elu,
    "leaky_relu": _leaky_relu,
    "selu": _selu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


# TensorFlow's (the odd pixel of stride 2 at the bottom and right), PyTorch's (k - 1) // 2.
PADDINGS = ("SAME", "SYMMETRIC")

# How kernels are drawn at the start, see `initial_kernel`.
INITIALIZERS = ("official", "fan_in")


def get_activation(name: str) -> Activation:
    """Returns an activation function by name; "" is silu, as None in the official code.

    Raises:
      UserError: unknown name; the message has the nearest valid one.
    """
    name = name or "silu"
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    near = difflib.get_close_matches(name, ACTIVATIONS, n=1, cutoff=0.0)[0]
    raise UserError(
        f"unknown activation {name!r}: did you mean {near!r}? Valid: {', '.join(ACTIVATIONS)}"
    )


def initial_kernel(layer: str, shape: tuple[int, ...], initializer: str) -> tuple[str, float]:
    """Returns how a kernel is drawn at the start: the distribution and its scale.

    official (effnetv2_model.py, conv_kernel_initializer and dense_kernel_initializer): convolutions
    normal with variance 2 / fan_out, where fan_out is k * k * (last dimension) and the last
    dimension of TensorFlow's depthwise kernels is the multiplier 1; the classifier uniform within
    +-1 / sqrt(classes). With few classes that is large: the logits of ten classes start with a
    deviation of about 4, and small data sets take long to unlearn it (docs/design.md).

    fan_in: every kernel normal with variance 1 / fan_in, as Flax's own layers start.

    Args:
      layer: "conv", "depthwise" or "classifier".
      shape: of our kernel, [k, k, in, out], depthwise [k, k, 1, channels], classifier [in, out].
      initializer: one of INITIALIZERS.

    Returns:
      ("normal", standard deviation) or ("uniform", bound).
    """
    if initializer == "fan_in":
        return "normal", 1 / math.sqrt(math.prod(shape[:-1]))
    if layer == "classifier":
        return "uniform", 1 / math.sqrt(shape[1])
    fan_out = shape[0] * shape[1] * (1 if layer == "depthwise" else shape[3])
    return "normal", math.sqrt(2 / fan_out)


def _kernel_init(layer: str, initializer: str) -> Callable[..., Array]:
    """The initial kernel as `Module.param` takes it."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        distribution, scale = initial_kernel(layer, shape, initializer)
        if distribution == "uniform":
            return jax.random.uniform(key, shape, dtype, -scale, scale)
        return scale * jax.random.normal(key, shape, dtype)

    return init


def _pads(kernel_size: int, padding: str) -> str | tuple[tuple[int, int], tuple[int, int]]:
    """The padding as `lowering` takes it."""
    if padding == "SYMMETRIC":
        side = ((kernel_size - 1) // 2,) * 2
        return (side, side)
    return padding


class Conv(nn.Module):
    """Convolution [N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), features].

    Attributes:
      features: output channels.
      kernel_size: side of the kernel.
      stride: step in both directions.
      use_bias: whether to add a bias.
      padding: "SAME" (TensorFlow's) or "SYMMETRIC" (PyTorch's); they differ at stride 2.
      dtype: of the output, to which the input is cast.
      product_dtype: of the kernel, and maybe of what it multiplies, see `lowering.conv2d`; None:
        dtype.
      implementation: of the lowering, one of `lowering.IMPLEMENTATIONS`.
      initializer: of the kernel, one of INITIALIZERS.
      sum_over: mesh axis over whose devices the input channels are divided, inside
        `jax.shard_map`: each has its rows of the kernel, the sum of their products is the result.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    use_bias: bool = False
    padding: str = "SAME"
    dtype: jnp.dtype = jnp.float32
    product_dtype: jnp.dtype | None = None
    implementation: str = "auto"
    initializer: str = "official"
    sum_over: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolves x [N, H, W, C]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init("conv", self.initializer), shape, jnp.float32)
        x = lowering.conv2d(
            x,
            kernel.astype(self.product_dtype or self.dtype),
            stride=self.stride,
            padding=_pads(self.kernel_size, self.padding),
            implementation=self.implementation,
            dtype=self.dtype,
        )
        if self.sum_over is not None and not self.is_initializing():
            x = lax.psum(x, self.sum_over)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            x = x + bias.astype(self.dtype)
        return x


class DepthwiseConv(nn.Module):
    """Convolves every channel with a kernel of its own; attributes as of `Conv`."""

    kernel_size: int
    stride: int = 1
    padding: str = "SAME"
    dtype: jnp.dtype = jnp.float32
    product_dtype: jnp.dtype | None = None
    implementation: str = "auto"
    initializer: str = "official"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolves x [N, H, W, C]."""
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param(
            "kernel", _kernel_init("depthwise", self.initializer), shape, jnp.float32
        )
        return lowering.depthwise_conv2d(
            x,
            kernel.astype(self.product_dtype or self.dtype),
            stride=self.stride,
            padding=_pads(self.kernel_size, self.padding),
            implementation=self.implementation,
            dtype=self.dtype,
        )


class Classifier(nn.Module):
    """The last layer, [N, C] -> [N, num_classes], always computed in float32.

    Attributes:
      num_classes: outputs.
      bias: initial value of every bias (official: headbias).
      initializer: of the kernel, one of INITIALIZERS.
    """

    num_classes: int
    bias: float = 0.0
    initializer: str = "official"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the logits."""
        shape = (x.shape[-1], self.num_classes)
        kernel = self.param(
            "kernel", _kernel_init("classifier", self.initializer), shape, jnp.float32
        )
        init = nn.initializers.constant(self.bias)
        return x.astype(jnp.float32) @ kernel + self.param("bias", init, shape[1:], jnp.float32)


def dropout(x: Array, rate: float | Array, noise: Array) -> Array:
    """Zeroes the elements whose noise is below `rate`, scales the others by 1 / (1 - rate).

    Args:
      x: any shape.
      rate: in [0, 1); may be traced.
      noise: uniform in [0, 1), the shape of x.
    """
    return jnp.where(noise >= rate, x / (1 - rate), 0).astype(x.dtype)


def drop_path(x: Array, survival_prob: float | Array, noise: Array) -> Array:
    """Zeroes whole examples, scales the others by 1 / survival_prob (stochastic depth).

    Official: utils.py, drop_connect; like there, the sum of probability and noise is rounded to
    the type of x, which in bfloat16 shifts the probability by up to 1/256.

    Args:
      x: [N, H, W, C].
      survival_prob: probability to keep an example; may be traced.
      noise: [N], uniform in [0, 1).
    """
    survival = jnp.asarray(survival_prob, x.dtype)
    keep = jnp.floor(survival + noise.astype(x.dtype))
    return x / survival * keep[:, None, None, None]


def example_keys(key: Array, count: int, *, axis_name: str | None) -> Array:
    """One random key per example, by its position in the global batch.

    The same example gets the same noise on any number of devices.

    Args:
      key: typed key, equal on all devices.
      count: examples on this device.
      axis_name: mesh axis over which the batch is split, in order; None: not split.

    Returns:
      [count] keys.
    """
    first = lax.axis_index(axis_name) * count if axis_name is not None else 0
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))
