"""Activations for XLA's CPU backend: stored once forward, computed again backward; own silu."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering.windows import materialize

_Function = Callable[[jax.Array], jax.Array]

# ln 2 in two parts, so that n times the first is exact for |n| < 2**15.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# e**-r = 1 - r + c[0] r**2 + c[1] r**3 + ... for |r| <= ln(2) / 2: of the polynomials of fifth
# degree that begin so, the one with the least largest relative error, 1.05e-7.
_COEFFICIENTS = (0.499992311, -0.166671142, 0.0418901555, -0.00831251964)

# 1.5 * 2**23: float32 next to it are whole numbers.
_ROUNDS = 12582912.0


def stored(function: _Function) -> _Function:
    """Returns the activation function with the same values and gradients; no forward mode.

    Its result is stored for all that read it: XLA would compute silu once for the next convolution
    and again for the gradient of its kernel, with the sigmoid written to memory between the two.
    The sigmoid is not kept for the backward pass: that costs as much time as to compute it again,
    a pass that writes nothing else, and the memory of another activation.
    """
    recomputed = jax.checkpoint(silu if function is jax.nn.silu else function)

    @jax.custom_vjp
    def activation(x: jax.Array) -> jax.Array:
        return materialize(recomputed(x))

    def forward(x: jax.Array) -> tuple[jax.Array, _Function]:
        y, pull_back = jax.vjp(recomputed, x)
        return materialize(y), pull_back

    activation.defvjp(forward, lambda pull_back, dy: pull_back(dy))
    return activation


@jax.custom_jvp
@jax.jit
def silu(x: jax.Array) -> jax.Array:
    """The product of x and its sigmoid, any shape; float32 to 3e-7 of each value.

    A network computes a few million of them for an image. XLA's exponential guards every step of
    itself and is multiplied once more: this takes three quarters of the time (docs/cpu_forms.md).
    Below -88 it is x / e**88. Other types are left to `jax.nn.silu`.
    """
    return jax.nn.silu(x) if x.dtype != jnp.float32 else x / (1 + _exp_of_minus(x))


@silu.defjvp
def _silu_jvp(inputs: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = inputs, tangents
    if x.dtype != jnp.float32:
        return jax.jvp(jax.nn.silu, inputs, tangents)
    sigmoid = _sigmoid(x)
    return silu(x), dx * (sigmoid * (1 + x * (1 - sigmoid)))


@jax.custom_jvp
def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + _exp_of_minus(x))


@_sigmoid.defjvp
def _sigmoid_jvp(
    inputs: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = _sigmoid(*inputs)
    return y, tangents[0] * y * (1 - y)


def _exp_of_minus(x: jax.Array) -> jax.Array:
    """e**-x, float32, x taken as no less than -88 and no more than 87."""
    x = lax.clamp(jnp.float32(-88), x, jnp.float32(87))
    # -x log2(e) = n + a rest; the sum has n, rounded, as its last bits. The difference is -n: XLA
    # would fold the constants of the opposite one.
    sum_with_n = x * -1.44269504 + _ROUNDS
    minus_n = _ROUNDS - sum_with_n
    r = x - minus_n * _LN2_HIGH - minus_n * _LN2_LOW
    polynomial = jnp.full_like(r, _COEFFICIENTS[-1])
    for coefficient in (*_COEFFICIENTS[-2::-1], -1, 1):
        polynomial = polynomial * r + coefficient
    # Times 2**n: n is added to the exponent.
    polynomial, sum_with_n = (
        lax.bitcast_convert_type(v, jnp.int32) for v in (polynomial, sum_with_n)
    )
    return lax.bitcast_convert_type(polynomial + (sum_with_n << 23), jnp.float32)
