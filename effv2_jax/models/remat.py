"""Rematerialization: the backward pass computes again what is not kept.

Of a whole block (`recomputed`), or what stands between two convolutions (`normed_conv`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax

from effv2_jax.models import lowering

Array = jax.Array


def recomputed(
    block: nn.Module, x: Array, *rest: Any, train: bool, implementation: str = "auto"
) -> Any:
    """Applies a block and keeps nothing but its input for the backward pass.

    Unlike `nn.remat` the second computation waits for the gradient on every backend: XLA's CPU
    backend drops the barriers of `jax.checkpoint` before it puts operations in order, begins the
    second computation early and then holds both (`Lowering.after`).

    Args:
      block: submodule of the calling module, called as block(x, train, *rest); draws no random
        numbers.
      x: [N, H, W, C].
      rest: arrays or None, differentiated too.
      train: see the block.
      implementation: of the lowering, one of `lowering.IMPLEMENTATIONS`.

    Returns:
      What the block returns.
    """
    alone = block.clone(parent=None, name=None)

    def apply(module: nn.Module, x: Array, *rest: Any) -> Any:
        return module(x, train, *rest)

    def forward(module: nn.Module, *inputs: Any) -> tuple[Any, Any]:
        variables = module.variables
        return apply(module, *inputs), (variables, inputs)

    def backward(kept: Any, gradients: Any) -> tuple[Any, ...]:
        variables, (x, *rest) = kept
        x = lowering.choose(implementation).after(x, jax.tree.leaves(gradients)[0])

        def again(params: Any, *inputs: Any) -> Any:
            every = {**variables, "params": params}
            return alone.apply(every, inputs[0], train, *inputs[1:], mutable=["batch_stats"])[0]

        _, pull_back = jax.vjp(again, variables["params"], x, *rest)
        of_params, *of_inputs = pull_back(gradients)
        return ({"params": of_params}, *of_inputs)

    return nn.custom_vjp(apply, forward_fn=forward, backward_fn=backward)(block, x, *rest)


class Between(Protocol):
    """What stands between two convolutions: a norm, an activation, perhaps squeeze-and-excite."""

    def forward(self, x: Array, params: Any) -> tuple[tuple[Array, Any], Any]:
        """Returns its values [N, H, W, C], something without gradient, and what it keeps."""

    def again(self, x: Array, kept: Any) -> Array:
        """Returns its values."""

    def backward(self, x: Array, kept: Any, gradient: Array) -> tuple[Array, Any]:
        """Returns the gradients of x and of the parameters from that of the values."""


@dataclasses.dataclass(frozen=True, eq=False)
class NormedConv:
    """What `normed_conv` computes.

    Attributes:
      between: what the convolution gets.
      conv: (parameters, values [N, H, W, C]) -> [N, H', W', C'].
      after: of the lowering.
    """

    between: Between
    conv: Callable[[Any, Array], Array]
    after: Callable[[Array, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normed_conv(
    how: NormedConv, x: Array, params: Any, conv_params: Any
) -> tuple[Array, Array, Any]:
    """Applies what stands between two convolutions, and the second, which does not keep its input.

    Left alone a norm keeps what it got and the convolution behind it what it got, both as large as
    a layer can be. Here the second is computed again from the first: one more pass over memory, and
    no product of matrices.

    Args:
      how: see `NormedConv`.
      x: what the first convolution gave, [N, H, W, C].
      params: of `how.between`.
      conv_params: of `how.conv`.

    Returns:
      What the convolution gives, what it gets, and what `how.between` gives without gradient.
    """
    return _forward(how, x, params, conv_params)[0]


def _forward(
    how: NormedConv, x: Array, params: Any, conv_params: Any
) -> tuple[tuple[Array, Array, Any], Any]:
    (y, rest), kept = how.between.forward(x, params)
    return (how.conv(conv_params, y), y, rest), (x, kept, conv_params)


def _backward(
    how: NormedConv, residuals: Any, gradients: tuple[Array, Array, Any]
) -> tuple[Array, Any, Any]:
    x, kept, conv_params = residuals
    of_output, of_values, _ = gradients
    x = how.after(x, of_output)
    _, pull_back = jax.vjp(how.conv, conv_params, how.between.again(x, kept))
    dconv_params, dy = pull_back(of_output)
    return (*how.between.backward(x, kept, dy + of_values), dconv_params)


normed_conv.defvjp(_forward, _backward)
