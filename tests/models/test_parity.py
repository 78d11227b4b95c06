"""The whole networks against the official code: variables, logits, endpoints."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.convert import names_tf
from effv2_jax.models.network import create_model
from effv2_jax.models.variants import list_models
from tests import reference

QUICK = (
    "efficientnetv2-b0",
    "efficientnetv2-b1",
    "efficientnetv2-b2",
    "efficientnetv2-b3",
    "efficientnetv2-s",
    "efficientnet-b0",
    "efficientnet-b1",
    "efficientnet-b2",
)
# Rounding grows with depth; in the reference's own units oneDNN moves B8 by 2e-5.
DEEP = ("efficientnetv2-xl", "efficientnet-b7", "efficientnet-b8", "efficientnet-l2")


LOGIT_CASES = [
    pytest.param(
        name,
        case,
        id=f"{name}-{case}",
        marks=pytest.mark.slow if name not in QUICK or case == "full" else (),
    )
    for name in list_models()
    for case in ("square", "rect", "full")
    if f"{case}_logits" in reference.model_logits(name)
]


@pytest.mark.parametrize("name", list_models())
def test_variables_are_exactly_the_official_ones(name):
    facts, model = reference.model_facts(name), create_model(name)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def count(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    assert count(variables["params"]) == facts["params_trainable"]
    assert count(variables) == facts["params_total"]
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        keys = [entry.key for entry in path]
        shape = list(leaf.shape)
        if "depthwise_conv" in keys:
            shape[2], shape[3] = shape[3], shape[2]
        found["/".join(keys)] = (shape, keys[0] == "params")
    names = names_tf.tensor_names(model.block_specs)
    assert [n.theirs for n in names] == [row[0] for row in facts["variables"]]
    expected = {
        n.path: (shape, trainable)
        for n, (_, shape, trainable) in zip(names, facts["variables"], strict=True)
    }
    assert found == expected


@functools.lru_cache(maxsize=1)  # L2 alone is 2 GB
def _variables(name):
    return reference.model_variables(name)


@pytest.mark.parametrize(("name", "case"), LOGIT_CASES)
def test_logits_and_endpoints_equal_the_official_ones(name, case):
    model = create_model(name)
    images = reference.model_input(name, case)
    # Half the time to compile; `square` keeps the settings that everybody runs with.
    options = {"xla_backend_optimization_level": 0} if case == "rect" else None
    apply = jax.jit(functools.partial(model.apply, endpoints=True), compiler_options=options)
    logits, ends = apply(_variables(name), images)
    tolerance = 3e-4 if name in DEEP else 1e-4
    expected = reference.model_logits(name)[f"{case}_logits"]
    assert reference.logits_deviation(logits, expected) < tolerance
    deviations = reference.endpoint_deviations(name, case, jax.tree.map(np.asarray, ends))
    assert {end: d for end, d in deviations.items() if d >= tolerance} == {}


def test_reductions_are_the_official_blocks():
    for name in ("efficientnetv2-s", "efficientnet-b0"):
        specs = create_model(name).block_specs
        last = [i for i, s in enumerate(specs) if i + 1 == len(specs) or specs[i + 1].stride > 1]
        expected = reference.model_facts(name)["endpoint_blocks"]
        assert {f"reduction_{k + 1}": i for k, i in enumerate(last)} == expected
