"""What a network is made of: stem, MBConv, FusedMBConv, squeeze-and-excite, head.

Official: effnetv2_model.py (Stem, MBConvBlock, FusedMBConvBlock, SE, Head). Paper: section 3.2 and
Figure 2 of arXiv:2104.00298.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effv2_jax.models import lowering
from effv2_jax.models.block_spec import BlockSpec
from effv2_jax.models.layers import Activation, drop_path

Array = jax.Array
ModuleDef = Callable[..., nn.Module]


class SqueezeExcite(nn.Module):
    """Scales the channels by a gate computed from their means: [N, H, W, C] -> the same.

    Attributes:
      channels: squeezed channels.
      conv: makes a convolution with bias.
      activation: between the two convolutions.
      sum_over: mesh axis over whose devices C is divided, or None.
    """

    channels: int
    conv: ModuleDef
    activation: Activation
    sum_over: str | None = None

    def __call__(self, x: Array) -> Array:
        """Applies the gate."""
        return self.factor(self.means(x)) * x

    def means(self, x: Array) -> Array:
        """Returns the means of the channels [N, 1, 1, C]."""
        # Accumulated in float32: bfloat16 has 8 bits for sums of thousands of pixels.
        return jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)

    @nn.compact
    def factor(self, means: Array) -> Array:
        """Returns the factors [N, 1, 1, C] for the means of the channels [N, 1, 1, C]."""
        reduce = self.conv(self.channels, use_bias=True, sum_over=self.sum_over, name="reduce")
        expand = self.conv(means.shape[-1], use_bias=True, name="expand")
        return jax.nn.sigmoid(expand(self.activation(reduce(means))))


class _Block(nn.Module):
    """What both blocks share.

    Attributes:
      spec: kernel, stride, expansion, channels; `repeats` is not used.
      conv: makes a `Conv` from features, kernel_size, stride.
      depthwise: makes a `DepthwiseConv` from kernel_size, stride.
      norm: makes a `BatchNorm`.
      activation: after every norm that is not the last one.
      implementation: of the lowering, one of `lowering.IMPLEMENTATIONS`.
      remat_norms: see `network.EfficientNet`.
      divide_by: devices among which the inner channels are divided, of MBConv only.
      sum_over: mesh axis of these devices; None: not divided.
    """

    spec: BlockSpec
    conv: ModuleDef
    depthwise: ModuleDef
    norm: ModuleDef
    activation: Activation
    implementation: str = "auto"
    remat_norms: bool = False
    divide_by: int = 1
    sum_over: str | None = None

    def _stored(self, inputs: Array) -> Array:
        """The input, read by the first convolution and by the shortcut."""
        if not self.spec.has_residual:
            return inputs
        return lowering.choose(self.implementation).stored(inputs)

    def _squeeze_excite(self) -> SqueezeExcite | None:
        if not self.spec.se_channels:
            return None
        return SqueezeExcite(
            self.spec.se_channels, self.conv, self.activation, self.sum_over, name="se"
        )

    def _residual(
        self, inputs: Array, x: Array, survival_prob: float | Array | None, noise: Array | None
    ) -> Array:
        """Adds the shortcut where there is one; only such blocks can be dropped."""
        if not self.spec.has_residual:
            return x
        if noise is not None:
            x = drop_path(x, survival_prob, noise)
        return x + inputs


def _convolve(
    norm: nn.Module, conv: nn.Module, x: Array, train: bool, *following: Any, again: bool
) -> tuple[Array, Array]:
    """Norm, activation, gate and convolution: what the last gives, and what it gets.

    A function, since operations of a method would have its name before their module's.
    """
    if again:
        return norm(x, train, *following, conv=conv)
    y = norm(x, train, *following)
    return conv(y), y


class MBConv(_Block):
    """1x1 expansion, depthwise convolution, squeeze-and-excite, linear 1x1 projection."""

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        train: bool,
        survival_prob: float | Array | None = None,
        noise: Array | None = None,
    ) -> tuple[Array, Array]:
        """Applies the block.

        Args:
          inputs: [N, H, W, in_channels].
          train: whether norms use the batch's statistics.
          survival_prob: probability to keep an example's residual branch.
          noise: [N] uniform in [0, 1) for drop path; None: no drop path.

        Returns:
          [N, ceil(H / stride), ceil(W / stride), channels], and the input of the projection
          (official endpoint: expansion_output).
        """
        spec = self.spec
        x = inputs = self._stored(inputs)
        again = self.remat_norms and train and not self.is_initializing()
        depthwise = self.depthwise(spec.kernel, stride=spec.stride, name="depthwise_conv")
        if spec.expands:
            x = self.conv(spec.inner_channels // self.divide_by, name="expand_conv")(x)
            norm = self.norm(name="expand_norm")
            x, _ = _convolve(norm, depthwise, x, train, self.activation, again=again)
        else:
            x = depthwise(x)
        project = self.conv(spec.channels, sum_over=self.sum_over, name="project_conv")
        norm, gate = self.norm(name="depthwise_norm"), self._squeeze_excite()
        x, expansion = _convolve(norm, project, x, train, self.activation, gate, again=again)
        x = self.norm(name="project_norm")(x, train)
        return self._residual(inputs, x, survival_prob, noise), expansion


class FusedMBConv(_Block):
    """k x k expansion, squeeze-and-excite, linear 1x1 projection.

    Without expansion (expand 1) one k x k convolution remains, with an activation after its norm:
    the only block whose branch does not end linear (unless `spec.two_convs` keeps both).
    """

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        train: bool,
        survival_prob: float | Array | None = None,
        noise: Array | None = None,
    ) -> tuple[Array, Array]:
        """Applies the block; arguments and results as of `MBConv`.

        The official endpoint expansion_output is taken before squeeze-and-excite here.
        """
        spec = self.spec
        x = inputs = self._stored(inputs)
        again = self.remat_norms and train and not self.is_initializing()
        if spec.expands:
            x = self.conv(
                spec.inner_channels, kernel_size=spec.kernel, stride=spec.stride, name="expand_conv"
            )(x)
            project = self.conv(spec.channels, name="project_conv")
            norm, gate = self.norm(name="expand_norm"), self._squeeze_excite()
            if gate is None:
                x, expansion = _convolve(norm, project, x, train, self.activation, again=again)
            else:
                expansion = norm(x, train, self.activation)
                x = project(gate(expansion))
            x = self.norm(name="project_norm")(x, train)
        else:
            expansion, gate = x, self._squeeze_excite()
            x = x if gate is None else gate(x)
            x = self.conv(
                spec.channels, kernel_size=spec.kernel, stride=spec.stride, name="project_conv"
            )(x)
            x = self.norm(name="project_norm")(x, train, self.activation)
        return self._residual(inputs, x, survival_prob, noise), expansion


class _End(nn.Module):
    """What stem and head share.

    Attributes:
      channels: of the output.
      conv: makes a `Conv` from features, kernel_size, stride.
      norm: makes a `BatchNorm`.
      activation: after the norm.
    """

    channels: int
    conv: ModuleDef
    norm: ModuleDef
    activation: Activation


class Stem(_End):
    """3x3 convolution of stride 2, norm, activation: [N, H, W, 3] -> [N, H / 2, W / 2, C]."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Applies the stem."""
        x = self.conv(self.channels, kernel_size=3, stride=2, name="conv")(x)
        return self.norm(name="norm")(x, train, self.activation)


class Head(_End):
    """1x1 convolution, norm, activation: [N, h, w, C] -> [N, h, w, channels]."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Applies the head, up to the pooling."""
        x = self.conv(self.channels, name="conv")(x)
        return self.norm(name="norm")(x, train, self.activation)
