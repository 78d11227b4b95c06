"""Losses and their gradients against the official ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.training.losses import example_losses
from tests import reference

# official kind -> ours
KINDS = {
    "softmax": {"kind": "softmax"},
    "sigmoid": {"kind": "sigmoid"},
    "custom": {"kind": "summed_sigmoid"},
    "softmax_multiclass": {"kind": "softmax", "multilabel": True},
}


def data() -> dict:
    return reference.load_json("losses.json")


@pytest.mark.parametrize("index", range(11))
def test_value_and_gradient_equal_the_official_loss(index):
    case = data()["cases"][index]
    labels = jnp.asarray(data()[case["labels"]], jnp.float32)

    def batch_loss(logits: jax.Array) -> jax.Array:
        return jnp.mean(
            example_losses(
                logits, labels, label_smoothing=case["label_smoothing"], **KINDS[case["kind"]]
            )
        )

    logits = jnp.asarray(data()["logits"], jnp.float32)
    value, gradient = jax.value_and_grad(batch_loss)(logits)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, case["grad"], rtol=1e-5, atol=1e-7)


def test_all_official_losses_are_covered():
    assert len(data()["cases"]) == 11
    assert {case["kind"] for case in data()["cases"]} == set(KINDS)


def test_multilabel_softmax_of_an_example_without_label_is_nan():
    labels = jnp.zeros((2, 3)).at[0, 1].set(1)
    losses = example_losses(jnp.zeros((2, 3)), labels, kind="softmax", multilabel=True)
    assert np.isfinite(losses[0])
    assert np.isnan(losses[1])
    assert data()["multiclass_empty_row_loss"] == "nan"


@pytest.mark.parametrize("kind", ["sigmoid", "summed_sigmoid"])
def test_sigmoid_losses_are_finite_for_huge_logits_and_empty_rows(kind):
    logits = jnp.asarray([[1e4, -1e4], [-1e4, 1e4]])
    labels = jnp.asarray([[0.0, 0.0], [1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(example_losses(x, labels, kind=kind)))(
        logits
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="'hinge' is none of softmax"):
        example_losses(jnp.zeros((1, 2)), jnp.zeros((1, 2)), kind="hinge")
