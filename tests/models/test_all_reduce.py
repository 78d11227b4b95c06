"""Sums over devices: as JAX's, in fewer messages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.lowering import all_reduce
from effv2_jax.models.network import create_model

GROUPS = [[0, 1], [2, 3]]


def _on_devices(function, *values):
    """Compiles a function of a device's part of `values` for four devices."""
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=axis_types)
    split = PartitionSpec("data")
    sharded = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return jax.jit(sharded).lower(*values).compile()


def _arrays_summed(compiled):
    """How many arrays the all-reduces of a compiled program take, together."""
    operands = re.findall(r" all-reduce\((.*?)\)", compiled.as_text())
    return sum(found.count("%") for found in operands)


def _values():
    draw = np.random.default_rng(0)
    return {
        "kernel": draw.normal(size=(4, 3, 3, 5)).astype(np.float32),
        "bias": draw.normal(size=(4, 7)).astype(np.float32),
        "large": draw.normal(size=(4, 40, 10)).astype(np.float32),
        "scalar": draw.normal(size=4).astype(np.float32),
        "count": np.arange(4, dtype=np.int32),
        "other": np.arange(8, dtype=np.int32).reshape(4, 2),
    }


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["all", "groups"])
@pytest.mark.parametrize(("joined", "arrays"), [(0, 6), (4 * 45, 3), (10**6, 2)])
def test_sums_are_those_of_jax_in_as_few_arrays_as_asked_for(joined, arrays, groups):
    values = _values()

    def ours(tree):
        return all_reduce.psum(tree, "data", joined_bytes=joined, axis_index_groups=groups)

    def plain(tree):
        return jax.lax.psum(tree, "data", axis_index_groups=groups)

    found, expected = (_on_devices(function, values) for function in (ours, plain))
    jax.tree.map(np.testing.assert_array_equal, found(values), expected(values))
    assert _arrays_summed(found) == arrays


def test_an_axis_of_one_device_is_left_alone():
    values = jax.tree.map(lambda v: v[:1], _values())
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=axis_types)
    ours = jax.shard_map(
        lambda tree: all_reduce.psum(tree, "data", joined_bytes=10**6),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    compiled = jax.jit(ours).lower(values).compile()
    jax.tree.map(np.testing.assert_array_equal, compiled(values), values)
    assert "all-reduce" not in compiled.as_text()


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["all", "groups"])
def test_means_are_those_of_jax(groups):
    values = {name: value.astype(np.float32) for name, value in _values().items()}

    def ours(tree):
        return all_reduce.pmean(tree, "data", joined_bytes=4 * 45, axis_index_groups=groups)

    def plain(tree):
        return jax.lax.pmean(tree, "data", axis_index_groups=groups)

    found, expected = (_on_devices(function, values)(values) for function in (ours, plain))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Without groups the devices meet for the batch's statistics, with groups on a device for the
# moving ones only, with groups of two devices for both.
@pytest.mark.parametrize(("group_size", "meetings"), [(0, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("form", ["cpu", "plain"])
def test_a_norm_of_the_network_waits_once_on_cpus(form, group_size, meetings):
    model = create_model(
        "efficientnetv2-b0",
        3,
        blocks=["r1_k3_s1_e1_i32_o16_c1"],
        survival_prob=1.0,
        lowering=form,
        axis_name="data",
        bn_group_size=group_size,
    )
    variables = init_variables(model.clone(axis_name=None), 0)
    norms = len(jax.tree.leaves(variables["batch_stats"])) // 2  # mean and variance

    def forward(images):
        return model.apply(variables, images, train=True, dropout_rate=0.0, mutable=["batch_stats"])

    images = jnp.ones((4, 32, 32, 3))
    expected = norms * meetings * (1 if form == "cpu" else 2)
    assert _arrays_summed(_on_devices(forward, images)) == expected
