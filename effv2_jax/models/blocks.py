"""The blocks: MBConv, FusedMBConv, and the squeeze-and-excite inside them.

Official: effnetv2_model.py (MBConvBlock, FusedMBConvBlock, SE). Paper: section 3.2 and Figure 2 of
arXiv:2104.00298.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    """

    channels: int
    conv: ModuleDef
    activation: Activation

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the gate."""
        # The mean is accumulated in float32: bfloat16 has 8 bits for sums of thousands of pixels.
        pooled = jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        squeezed = self.activation(self.conv(self.channels, use_bias=True, name="reduce")(pooled))
        gate = self.conv(x.shape[-1], use_bias=True, name="expand")(squeezed)
        return jax.nn.sigmoid(gate) * x


class _Block(nn.Module):
    """What both blocks share.

    Attributes:
      spec: kernel, stride, expansion, channels; `repeats` is not used.
      conv: makes a `Conv` from features, kernel_size, stride.
      depthwise: makes a `DepthwiseConv` from kernel_size, stride.
      norm: makes a `BatchNorm`.
      activation: after every norm that is not the last one.
    """

    spec: BlockSpec
    conv: ModuleDef
    depthwise: ModuleDef
    norm: ModuleDef
    activation: Activation

    def _squeeze_excite(self, x: Array) -> Array:
        if not self.spec.se_channels:
            return x
        return SqueezeExcite(self.spec.se_channels, self.conv, self.activation, name="se")(x)

    def _residual(
        self, inputs: Array, x: Array, survival_prob: float | Array | None, noise: Array | None
    ) -> Array:
        """Adds the shortcut where there is one; only such blocks can be dropped."""
        if not self.spec.has_residual:
            return x
        if noise is not None:
            x = drop_path(x, survival_prob, noise)
        return x + inputs


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
        spec, x = self.spec, inputs
        if spec.expands:
            x = self.conv(spec.inner_channels, name="expand_conv")(x)
            x = self.activation(self.norm(name="expand_norm")(x, train))
        x = self.depthwise(spec.kernel, stride=spec.stride, name="depthwise_conv")(x)
        x = self.activation(self.norm(name="depthwise_norm")(x, train))
        expansion = x = self._squeeze_excite(x)
        x = self.conv(spec.channels, name="project_conv")(x)
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
        spec, x = self.spec, inputs
        if spec.expands:
            x = self.conv(
                spec.inner_channels, kernel_size=spec.kernel, stride=spec.stride, name="expand_conv"
            )(x)
            x = self.activation(self.norm(name="expand_norm")(x, train))
        expansion = x
        x = self._squeeze_excite(x)
        if spec.expands:
            x = self.conv(spec.channels, name="project_conv")(x)
            x = self.norm(name="project_norm")(x, train)
        else:
            x = self.conv(
                spec.channels, kernel_size=spec.kernel, stride=spec.stride, name="project_conv"
            )(x)
            x = self.activation(self.norm(name="project_norm")(x, train))
        return self._residual(inputs, x, survival_prob, noise), expansion
