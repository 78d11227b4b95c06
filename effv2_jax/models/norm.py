"""Batch normalisation: what it means, and what follows it up to the next convolution.

How it is computed in training on GPUs is the business of `lowering/gpu_norm.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.errors import UserError
from effv2_jax.models import lowering
from effv2_jax.models.lowering import all_reduce
from effv2_jax.models.remat import NormedConv, normed_conv

Array = jax.Array
DeviceGroups = list[list[int]] | None


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
      implementation: of the lowering, one of `lowering.IMPLEMENTATIONS`.
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
    implementation: str = "auto"
    freeze: str = ""
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        train: bool,
        activation: Callable[[Array], Array] | None = None,
        gate: nn.Module | None = None,
        conv: nn.Module | None = None,
    ) -> Array | tuple[Array, Array]:
        """Normalises x [N, H, W, C], with `train` by its own statistics.

        What follows up to the next convolution is applied here, since some backends compute it in
        the same passes over memory.

        Args:
          x: [N, H, W, C].
          train: whether the statistics are those of x, and move.
          activation: of the normalised values.
          gate: a `blocks.SqueezeExcite`, applied to the activation.
          conv: the convolution behind these, to be applied too; it does not keep what it gets for
            the backward pass, which computes that again (`remat.normed_conv`).

        Returns:
          [N, H, W, C]; with `conv` a pair: what it gives, and what it gets.
        """
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        moving_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        moving_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)

        forms = lowering.choose(self.implementation)

        def activated(y: Array) -> Array:
            y = y.astype(self.dtype)
            return y if activation is None else forms.activation(activation)(y)

        def follow(values: Callable[[Array, Any], Array], vectors: Any) -> Any:
            """All that follows from the activation, which is values(x, vectors)."""
            if conv is not None:
                params, factors, means = None, None, None
                if gate is not None:
                    module, params = _unbound(gate)
                    factors, means = functools.partial(_factor, module), module.means
                between = _Between(values, factors, means)
                return _remat(forms, between, x, (vectors, params), conv)[:2]
            y = values(x, vectors)
            return y if gate is None else gate(y)

        if not train or self._is_frozen():
            factor = scale * lax.rsqrt(moving_var.value + self.epsilon)
            return follow(
                lambda x, v: activated((x.astype(jnp.float32) - v[0]) * v[1] + v[2]),
                (moving_mean.value, factor, bias),
            )

        axis_name = None if self.is_initializing() else self.axis_name
        groups, device_groups = self._layout(x.shape[0], axis_name)
        if device_groups and len(device_groups[0]) == 1:
            axis_name = None  # every device is a group of its own
        own = forms.norm
        if own is not None and not self.two_pass and not self.is_initializing():
            how = lowering.Norm(self.epsilon, groups, axis_name, device_groups, activation)
            params = None
            if gate is not None:
                module, params = _unbound(gate)
                how = dataclasses.replace(how, gate=functools.partial(_factor, module))
            if conv is not None:
                out, y, (mean, var) = _remat(
                    forms, how, x.astype(self.dtype), (scale, bias, params), conv
                )
            else:
                y, mean, var = own(how, x.astype(self.dtype), scale, bias, params)
            self._move(moving_mean, moving_var, mean, var, x, device_groups)
            return y if conv is None else (out, y)

        def grouped(x: Array) -> Array:
            x32 = x.astype(jnp.float32)
            return x32.reshape(groups, -1, *x.shape[1:]) if groups > 1 else x32

        mean, var = self._moments(grouped(x), axis_name, device_groups)
        self._move(moving_mean, moving_var, mean, var, x, device_groups)
        factor = lax.rsqrt(var + self.epsilon) * scale
        if self.two_pass:
            return follow(
                lambda x, v: activated(((grouped(x) - v[0]) * v[1] + v[2]).reshape(x.shape)),
                (mean, factor, bias),
            )
        # Rounds no worse than the one-pass variance, and the gradient needs x itself, not also
        # x - mean: a fifth less memory for activations on CPU.
        return follow(
            lambda x, v: activated((grouped(x) * v[0] + v[1]).reshape(x.shape)),
            (factor, bias - mean * factor),
        )

    def _is_frozen(self) -> bool:
        paths = ("/".join((*self.path, leaf)) for leaf in ("scale", "bias"))
        return bool(self.freeze) and all(re.match(self.freeze, path) for path in paths)

    def _move(
        self,
        moving_mean: nn.Variable,
        moving_var: nn.Variable,
        mean: Array,
        var: Array,
        x: Array,
        device_groups: DeviceGroups,
    ) -> None:
        """Moves the moving statistics towards those of the batch, [groups, ..., C] each."""
        if self.is_initializing() or not self.is_mutable_collection("batch_stats"):
            return
        groups = mean.size // x.shape[-1]
        count = x.size // mean.size
        if self.axis_name is not None:
            count *= len(device_groups[0]) if device_groups else lax.axis_size(self.axis_name)
        new_mean, new_var = (jnp.mean(v.reshape(groups, -1), 0) for v in (mean, var))
        if self.unbiased:
            new_var = new_var * (count / max(count - 1, 1))
        if self.axis_name is not None and self.group_size:
            new_mean, new_var = all_reduce.pmean(
                (new_mean, new_var),
                self.axis_name,
                joined_bytes=lowering.choose(self.implementation).joined_bytes,
            )
        for moving, new in ((moving_mean, new_mean), (moving_var, new_var)):
            old = self.momentum * moving.value
            moving.value = old + (1 - self.momentum) * lax.stop_gradient(new)

    def _layout(self, examples: int, axis_name: str | None) -> tuple[int, DeviceGroups]:
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
        self, x: Array, axis_name: str | None, device_groups: DeviceGroups
    ) -> tuple[Array, Array]:
        """Mean and biased variance of [N, H, W, C], or of every group of [groups, n, H, W, C]."""
        axes = tuple(range(x.ndim - 4, x.ndim - 1))

        def mean_of(*values: Array) -> tuple[Array, ...]:
            means = tuple(jnp.mean(v, axes, keepdims=True) for v in values)
            if axis_name is None:
                return means
            # Together: one message per norm.
            return all_reduce.pmean(
                means,
                axis_name,
                joined_bytes=lowering.choose(self.implementation).joined_bytes,
                axis_index_groups=device_groups,
            )

        if self.two_pass:
            (mean,) = mean_of(x)
            (var,) = mean_of(jnp.square(x - mean))
            return mean, var
        mean, mean_square = mean_of(x, jnp.square(x))
        # Rounding may leave a constant channel slightly below zero.
        return mean, jnp.maximum(mean_square - jnp.square(mean), 0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Between:
    """A norm by given vectors, the activation and squeeze-and-excite, as `remat.Between`.

    Attributes:
      values: (x, vectors) -> the activation.
      factors: (parameters, means) -> the factors of the channels; None: there are none.
      means: activation -> means of the channels, [N, 1, 1, C].
    """

    values: Callable[[Array, Any], Array]
    factors: Callable[[Any, Array], Array] | None
    means: Callable[[Array], Array] | None

    def forward(self, x: Array, params: Any) -> tuple[tuple[Array, None], Any]:
        vectors, gate_params = params
        y, factors, pull_factors = self.values(x, vectors), None, None
        if self.factors is not None:
            factors, pull_factors = jax.vjp(self.factors, gate_params, self.means(y))
            y = factors * y
        return (y, None), (vectors, factors, pull_factors)

    def again(self, x: Array, kept: Any) -> Array:
        vectors, factors, _ = kept
        y = self.values(x, vectors)
        return y if factors is None else factors * y

    def backward(self, x: Array, kept: Any, gradient: Array) -> tuple[Array, Any]:
        vectors, factors, pull_factors = kept
        y, pull_values = jax.vjp(self.values, x, vectors)
        dgate_params = None
        if factors is not None:
            _, pull_product = jax.vjp(jnp.multiply, factors, y)
            dfactors, gradient = pull_product(gradient)
            dgate_params, dmeans = pull_factors(dfactors)
            _, pull_means = jax.vjp(self.means, y)
            gradient += pull_means(dmeans)[0]
        dx, dvectors = pull_values(gradient)
        return dx, (dvectors, dgate_params)


def _remat(
    forms: lowering.Lowering, between: Any, x: Array, params: Any, conv: nn.Module
) -> tuple[Array, Array, Any]:
    """`remat.normed_conv` with the module of a convolution."""
    module, variables = _unbound(conv)
    how = NormedConv(between, module.apply, forms.after)
    return normed_conv(how, x, params, variables)


def _unbound(module: nn.Module) -> tuple[nn.Module, dict]:
    """A submodule and its variables, with the name by which profiles find its operations."""
    alone, variables = module.unbind()
    return alone.clone(name=module.name), variables


def _factor(squeeze_excite: nn.Module, variables: dict, means: Array) -> Array:
    """The factors of an unbound `blocks.SqueezeExcite`."""
    return squeeze_excite.apply(variables, means, method="factor")
