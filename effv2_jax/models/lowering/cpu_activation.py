"""Activations for XLA's CPU backend: stored once forward, computed again backward."""

from collections.abc import Callable

import jax

from effv2_jax.models.lowering.windows import materialize

_Function = Callable[[jax.Array], jax.Array]


def stored(function: _Function) -> _Function:
    """Returns the activation function with the same values and gradients; no forward mode.

    Its result is stored for all that read it: XLA would compute silu once for the next convolution
    and again for the gradient of its kernel, with the sigmoid written to memory between the two.
    The sigmoid is not kept for the backward pass: that costs as much time as to compute it again,
    a pass that writes nothing else, and the memory of another activation.
    """
    recomputed = jax.checkpoint(function)

    @jax.custom_vjp
    def activation(x: jax.Array) -> jax.Array:
        return materialize(recomputed(x))

    def forward(x: jax.Array) -> tuple[jax.Array, _Function]:
        y, pull_back = jax.vjp(recomputed, x)
        return materialize(y), pull_back

    activation.defvjp(forward, lambda pull_back, dy: pull_back(dy))
    return activation
