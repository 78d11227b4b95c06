"""The forms written for XLA's CPU backend against XLA's own convolutions."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effv2_jax.models import lowering

# Sums of up to k * k * C (forward) or N * H * W (kernel gradient) float32 products in another
# order; measured 2e-6 of the largest value.
TOLERANCE = 1e-5
SYMMETRIC = {1: ((0, 0), (0, 0)), 3: ((1, 1), (1, 1)), 5: ((2, 2), (2, 2))}


def _operation(kind, implementation, stride, padding):
    function = lowering.depthwise_conv2d if kind == "depthwise" else lowering.conv2d
    return functools.partial(
        function, stride=stride, padding=padding, implementation=implementation
    )


def _operands(kind, *, n, size, channels, filters, kernel, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    shape = (kernel, kernel) + ((1, channels) if kind == "depthwise" else (channels, filters))
    x = draw.standard_normal((n, *size, channels)).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(draw.standard_normal(shape).astype(np.float32))


def _value_and_gradients(operation, x, kernel):
    @jax.jit
    def run(x, kernel):
        y, pull_back = jax.vjp(operation, x, kernel)
        cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, *pull_back(cotangent.astype(y.dtype))

    return [np.asarray(a, np.float32) for a in run(x, kernel)]


def _assert_equal_forms(kind, x, kernel, *, stride, padding, tolerance=TOLERANCE):
    plain = _value_and_gradients(_operation(kind, "plain", stride, padding), x, kernel)
    fast = _value_and_gradients(_operation(kind, "cpu", stride, padding), x, kernel)
    for name, a, b in zip(("value", "dx", "dkernel"), fast, plain, strict=True):
        scale = max(np.abs(b).max(), 1e-6)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * scale, name


@pytest.mark.parametrize("padding", ["SAME", "symmetric"])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (9, 9)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_cpu_forms_equal_the_plain_ones(kind, stride, kernel, size, padding):
    padding = SYMMETRIC[kernel] if padding == "symmetric" else padding
    x, weights = _operands(kind, n=2, size=size, channels=6, filters=5, kernel=kernel)
    _assert_equal_forms(kind, x, weights, stride=stride, padding=padding)
