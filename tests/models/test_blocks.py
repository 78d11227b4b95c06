"""The ladder: single layers and blocks against the official code, one rung per case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.convert import mapping
from effv2_jax.models import layers
from effv2_jax.models.blocks import FusedMBConv, Head, MBConv, SqueezeExcite, Stem
from effv2_jax.models.norm import BatchNorm
from tests import reference

CASES = {
    key: case for key, case in reference.load_json("blocks.json").items() if not key.startswith("_")
}


class PooledHead(Head):
    """The official head layer ends with the pooling."""

    def __call__(self, x, train):
        return jnp.mean(super().__call__(x, train), (1, 2))


def _module(case, implementation="plain"):
    conv = functools.partial(layers.Conv, implementation=implementation)
    depthwise = functools.partial(layers.DepthwiseConv, implementation=implementation)
    parts = {"conv": conv, "norm": BatchNorm, "activation": jax.nn.silu}
    if case["kind"] == "stem":
        return Stem(case["filters"], **parts)
    if case["kind"] == "head":
        return PooledHead(case["filters"], **parts)
    cls = FusedMBConv if case["kind"] == "fused" else MBConv
    return cls(spec=reference.block_spec(case), depthwise=depthwise, **parts)


# Twice as fast to compile, and what is tested here is arithmetic, not LLVM.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _folder(case):
    return {"stem": "stem", "head": "head"}.get(case["kind"], "blocks_3")


def _variables(case):
    values = reference.make_all(case["variables"])
    tree = mapping.arrange(values, reference.case_names(case))
    return {key: node[_folder(case)] for key, node in tree.items()}


def _run(case, implementation):
    """Everything that the reference stores of a case, by its names there."""
    module, names = _module(case, implementation), reference.case_names(case)
    folder = _folder(case)
    variables = _variables(case)
    n, h, w, c = case["input_shape"]
    x = reference.image(h, w, n, case["input_seed"], channels=c)
    out = case["output_shape"]
    # Pooled features [n, c] get the cotangent of a 1 x 1 map.
    ho, wo = out[1:3] if len(out) == 4 else (1, 1)
    cotangent = reference.image(ho, wo, n, case["cotangent_seed"], channels=out[-1]).reshape(out)

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    def train(params, x):
        result, moved = module.apply(
            {**variables, "params": params}, x, True, mutable=["batch_stats"]
        )
        return first(result), moved["batch_stats"]

    @_jit
    def everything(variables, x):
        evaluated = first(module.apply(variables, x, False))
        trained, vjp, moved = jax.vjp(train, variables["params"], x, has_aux=True)
        return evaluated, trained, vjp(jnp.asarray(cotangent)), moved

    evaluated, trained, (grads, grad_x), moved = everything(variables, x)
    official = mapping.from_variables(
        {"params": {folder: grads}, "batch_stats": {folder: moved}}, names
    )
    results = {"out_eval": evaluated, "out_train": trained, "grad/input": grad_x}
    for name, value in official.items():
        results[f"{'moved' if '/moving_' in name else 'grad'}/{name}"] = value
    return results


# The forms for XLA's CPU backend are climbed by these cases; by all in the slow suite.
_QUICK_ON_CPU_FORMS = (
    "stem_15x17",
    "mbconv_k3_s1_e6_se0.25_i8_o8_8x6",
    "mbconv_k5_s2_e6_se0_i8_o8_7x9",
    "fused_k3_s1_e1_se0_i8_o8_8x6",
    "fused_k3_s2_e4_se0_i8_o12_8x6",
    "head_3x5",
)
LADDER = [pytest.param(key, "plain", id=f"{key}-plain") for key in CASES] + [
    pytest.param(
        key,
        "cpu",
        id=f"{key}-cpu",
        marks=() if key in _QUICK_ON_CPU_FORMS else pytest.mark.slow,
    )
    for key in CASES
]


@pytest.mark.parametrize(("key", "implementation"), LADDER)
def test_layer_equals_the_official_one_in_value_gradient_and_statistics(key, implementation):
    found = _run(CASES[key], implementation)
    stored = reference.load_npz("blocks.npz")
    expected = {
        name.removeprefix(f"{key}/"): value
        for name, value in stored.items()
        if name.startswith(f"{key}/")
    }
    assert set(found) == set(expected)
    # float32, relative to the largest element of each array; measured 6e-7, 2e-5 (a gradient that
    # nearly cancels) and 2e-7.
    limits = {"out_eval": 1e-5, "out_train": 1e-5, "grad": 1e-4, "moved": 1e-6}
    errors = {name: reference.relative_error(found[name], expected[name]) for name in expected}
    assert {n: e for n, e in errors.items() if e > limits[n.split("/")[0]]} == {}


def test_squeeze_excite_equals_its_definition():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    shapes = {"reduce": ((1, 1, 8, 2), (2,)), "expand": ((1, 1, 2, 8), (8,))}
    p = {
        key: {"kernel": rng.normal(size=kernel), "bias": rng.normal(size=bias)}
        for key, (kernel, bias) in shapes.items()
    }
    hidden = x.mean((1, 2)) @ p["reduce"]["kernel"][0, 0] + p["reduce"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    gate = 1 / (1 + np.exp(-(hidden @ p["expand"]["kernel"][0, 0] + p["expand"]["bias"])))
    module = SqueezeExcite(2, conv=layers.Conv, activation=jax.nn.silu)
    params = jax.tree.map(lambda v: v.astype(np.float32), p)
    found = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(found, x * gate[:, None, None, :], rtol=1e-5, atol=1e-6)


def _train_output(case, noise):
    x = reference.image(*case["input_shape"][1:3], 2, case["input_seed"], channels=8)

    @_jit
    def run(variables, x):
        out, _ = _module(case).apply(variables, x, True, 0.8, noise, mutable=["batch_stats"])
        return out[0]

    return x, run(_variables(case), x)


def test_dropped_example_keeps_its_shortcut_and_nothing_else():
    case = CASES["mbconv_k3_s1_e6_se0_i8_o8_8x6"]
    x, plain = _train_output(case, None)
    _, dropped = _train_output(case, jnp.asarray([0.1, 0.9]))  # floor(.8 + .1), floor(.8 + .9)
    np.testing.assert_array_equal(dropped[0], x[0])
    np.testing.assert_allclose(dropped[1], x[1] + (plain[1] - x[1]) / 0.8, rtol=1e-5, atol=1e-5)


def test_block_without_shortcut_is_never_dropped():
    case = CASES["mbconv_k3_s1_e6_se0_i8_o12_7x9"]
    np.testing.assert_array_equal(
        _train_output(case, None)[1], _train_output(case, jnp.zeros(2))[1]
    )
