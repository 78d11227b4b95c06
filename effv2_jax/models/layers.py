"""The layers of the networks: what convolution, norm, activation, dropout and drop path mean.

Parameters and moving statistics are float32; `dtype` is the compute type. Convolution kernels are
[k, k, in, out], depthwise kernels [k, k, 1, channels] (TensorFlow's are [k, k, channels, 1]).
How a convolution is computed on a backend is the business of `lowering.py`.
"""

import difflib
import math
import re
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
      dtype: compute type.
      implementation: of the lowering: "auto", "plain" or "cpu".
      initializer: of the kernel, one of INITIALIZERS.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    use_bias: bool = False
    padding: str = "SAME"
    dtype: jnp.dtype = jnp.float32
    implementation: str = "auto"
    initializer: str = "official"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolves x [N, H, W, C]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init("conv", self.initializer), shape, jnp.float32)
        x = lowering.conv2d(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=_pads(self.kernel_size, self.padding),
            implementation=self.implementation,
        )
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
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=_pads(self.kernel_size, self.padding),
            implementation=self.implementation,
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


class BatchNorm(nn.Module):
    """Batch normalisation of [N, H, W, C] over N, H, W, with float32 statistics.

    In training the output uses the batch's biased variance; the moving variance gets the unbiased
    one, as TensorFlow's fused norm on CPU and GPU does, or the biased one, as its TPU norm.
    Moving statistics are `momentum * old + (1 - momentum) * new`.

    Attributes:
      momentum: weight of the old moving statistics.
      epsilon: added to the variance.
      unbiased: the moving variance gets n / (n - 1) times the batch variance.
      group_size: examples that share statistics; 0: all (of all devices with `axis_name`). The
        groups are consecutive examples; moving statistics get the mean over the groups.
      two_pass: variance about the mean instead of E[x^2] - E[x]^2: slower, exact to rounding even
        where |mean| is far above the deviation.
      axis_name: mesh axis over which the batch is split; the layer then runs inside a `shard_map`.
      freeze: regular expression of parameter paths; a layer whose scale and bias match it
        normalises by its moving statistics in training too, and leaves them as they are.
      dtype: of the output.
    """

    momentum: float = 0.9
    epsilon: float = 1e-3
    unbiased: bool = True
    group_size: int = 0
    two_pass: bool = False
    axis_name: str | None = None
    freeze: str = ""
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Normalises x [N, H, W, C]; with `train` by its own statistics."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        moving_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        moving_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if not train or self._is_frozen():
            factor = scale * lax.rsqrt(moving_var.value + self.epsilon)
            y = (x.astype(jnp.float32) - moving_mean.value) * factor + bias
            return y.astype(self.dtype)

        axis_name = None if self.is_initializing() else self.axis_name
        groups, device_groups = self._layout(x.shape[0], axis_name)
        x32 = x.astype(jnp.float32)
        if groups > 1:
            x32 = x32.reshape(groups, -1, *x.shape[1:])
        mean, var = self._moments(x32, axis_name, device_groups)
        if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            count = x32.size // (groups * channels[0])
            if axis_name is not None:
                count *= len(device_groups[0]) if device_groups else lax.axis_size(axis_name)
            new_mean, new_var = (jnp.mean(v.reshape(groups, -1), 0) for v in (mean, var))
            if self.unbiased:
                new_var = new_var * (count / max(count - 1, 1))
            if axis_name is not None and self.group_size:
                new_mean, new_var = lax.pmean((new_mean, new_var), axis_name)
            moving_mean.value = self._move(moving_mean.value, new_mean)
            moving_var.value = self._move(moving_var.value, new_var)
        factor = lax.rsqrt(var + self.epsilon) * scale
        if self.two_pass:
            y = (x32 - mean) * factor + bias
        else:
            # Rounds no worse than the one-pass variance, and the gradient needs x itself, not also
            # x - mean: a fifth less memory for activations on CPU.
            y = x32 * factor + (bias - mean * factor)
        return y.reshape(x.shape).astype(self.dtype)

    def _is_frozen(self) -> bool:
        paths = ("/".join((*self.path, leaf)) for leaf in ("scale", "bias"))
        return bool(self.freeze) and all(re.match(self.freeze, path) for path in paths)

    def _move(self, old: Array, new: Array) -> Array:
        return self.momentum * old + (1 - self.momentum) * lax.stop_gradient(new)

    def _layout(self, examples: int, axis_name: str | None) -> tuple[int, list[list[int]] | None]:
        """Returns the number of groups within the device and the groups of devices, if any."""
        size = self.group_size
        if not size:
            return 1, None
        if size <= examples:
            if examples % size:
                raise UserError(
                    f"bn_group_size is {size}, the batch of a device {examples}: choose a divisor"
                )
            # Every device is a group of its own: no statistics cross devices.
            devices = lax.axis_size(axis_name) if axis_name is not None else 1
            return examples // size, [[i] for i in range(devices)]
        devices = lax.axis_size(axis_name) if axis_name is not None else 1
        together = size // examples
        if size % examples or devices % together:
            raise UserError(
                f"bn_group_size is {size}, the batch {devices} x {examples} (devices x examples): "
                "choose a divisor of the batch that is also a multiple of a device's examples"
            )
        return 1, [list(range(i, i + together)) for i in range(0, devices, together)]

    def _moments(
        self, x: Array, axis_name: str | None, device_groups: list[list[int]] | None
    ) -> tuple[Array, Array]:
        """Mean and biased variance of [N, H, W, C], or of every group of [groups, n, H, W, C]."""
        axes = tuple(range(x.ndim - 4, x.ndim - 1))

        def mean_of(*values: Array) -> tuple[Array, ...]:
            means = tuple(jnp.mean(v, axes, keepdims=True) for v in values)
            if axis_name is None or (device_groups and len(device_groups[0]) == 1):
                return means
            # Together: one message per norm.
            return lax.pmean(means, axis_name, axis_index_groups=device_groups)

        if self.two_pass:
            (mean,) = mean_of(x)
            (var,) = mean_of(jnp.square(x - mean))
            return mean, var
        mean, mean_square = mean_of(x, jnp.square(x))
        # Rounding may leave a constant channel slightly below zero.
        return mean, jnp.maximum(mean_square - jnp.square(mean), 0)


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
