"""Optimizers, clipping and the moving average against TensorFlow's, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effv2_jax.training import optimizers
from effv2_jax.training.ema import ema_decay, update_ema
from tests import reference

STEPS = 6
VARIABLES = 3
TOLERANCE = 2e-6  # of the largest value; float32, README of the reference data
EMA_DECAY = 0.3  # of the reference's average; reached at the third step


def arrays() -> dict[str, np.ndarray]:
    return reference.load_npz("optimizers.npz")


def tree(prefix: str) -> dict[str, np.ndarray]:
    return {f"v{i}": arrays()[f"{prefix}/{i}"] for i in range(VARIABLES)}


def assert_equal(found, expected) -> None:
    for name, value in expected.items():
        limit = TOLERANCE * np.max(np.abs(value))
        np.testing.assert_allclose(found[name], value, rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize("name", ["rmsprop", "momentum", "sgd", "adam"])
def test_six_steps_and_their_average_equal_tensorflow(name):
    optimizer = optimizers.make_optimizer(name)
    params = tree("init")
    state, average = optimizer.init(params), params

    @jax.jit
    def step(params, state, average, gradients, rate, n):
        updates, state = optimizer.update(gradients, state, params, learning_rate=rate)
        params = optax.apply_updates(params, updates)
        return params, state, update_ema(average, params, decay=ema_decay(EMA_DECAY, n))

    facts = reference.load_json("optimizers.json")[name]["ema"]
    for index in range(STEPS):
        assert facts[index]["decay"] == pytest.approx(float(ema_decay(EMA_DECAY, index + 1)))
        params, state, average = step(
            params, state, average, tree(f"grad/{index}"), arrays()["lr"][index], index + 1
        )
        assert_equal(params, tree(f"{name}/{index}"))
        assert_equal(average, tree(f"{name}/ema/{index}"))


@pytest.mark.parametrize("limit", [0.5, 2, 100])
@pytest.mark.parametrize("sign", [1, -1])
def test_clipping_equals_tensorflow(limit, sign):
    # The reference clips the gradients grad/2 together with one that is all zero.
    gradients = tree("grad/2")
    gradients["zero"] = jnp.zeros_like(arrays()[f"gclip/{limit}/zero"])
    clipped = optimizers.clip_gradients(gradients, sign * limit)
    assert_equal(clipped, {**tree(f"gclip/{limit}"), "zero": arrays()[f"gclip/{limit}/zero"]})


def test_gradient_norms_are_of_all_and_of_the_largest():
    norms = optimizers.gradient_norms({"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])})
    assert norms.all == 13
    assert norms.largest == 12


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_decoupled_decay_adds_rate_times_decay_times_parameter_where_the_mask_says(name):
    plain = optimizers.make_optimizer(name)
    decayed = optimizers.decoupled_decay(plain, 0.1, mask={"v0": True, "v1": False, "v2": False})
    params, gradients = tree("init"), tree("grad/0")
    state = plain.init(params)
    expected, _ = plain.update(gradients, state, params, learning_rate=0.5)
    found, new_state = decayed.update(gradients, state, params, learning_rate=0.5)
    np.testing.assert_allclose(found["v0"], expected["v0"] - 0.05 * params["v0"], rtol=1e-6)
    np.testing.assert_array_equal(found["v1"], expected["v1"])
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_frozen_parameters_get_no_update_and_no_slots(name):
    params, gradients = tree("init"), tree("grad/0")
    mask = {"v0": True, "v1": False, "v2": True}
    optimizer = optimizers.make_optimizer(name)
    frozen = optimizers.only_trainable(optimizer, mask)
    state = frozen.init(params)
    updates, _ = frozen.update(gradients, state, params, learning_rate=0.5)
    expected, _ = optimizer.update(gradients, optimizer.init(params), params, learning_rate=0.5)
    assert not np.any(updates["v1"])
    np.testing.assert_array_equal(updates["v0"], expected["v0"])

    def slots(state) -> list:
        return [leaf for leaf in jax.tree.leaves(state) if leaf.shape == params["v1"].shape]

    assert not slots(state)
    assert bool(slots(optimizer.init(params))) == (name != "sgd")


def test_average_of_constant_values_does_not_drift():
    values = {"a": jnp.float32([1.1, -3.7])}
    average = values
    for n in range(1, 50):
        average = update_ema(average, values, decay=ema_decay(0.9999, n))
    np.testing.assert_array_equal(average["a"], values["a"])
