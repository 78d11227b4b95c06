"""Rematerialization: the backward pass computes a block again, whose inner values are not kept."""

from typing import Any

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
