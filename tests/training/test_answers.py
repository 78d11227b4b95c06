"""The step of --mode eval, against its definition in NumPy."""

import jax
import numpy as np
import pytest

from effv2_jax.data.kinds import get_kind
from effv2_jax.training import mesh as meshes
from effv2_jax.training.answers import join_answers, make_answer_step
from tests.inference.networks import network

CLASSES, COUNT = 9, 8


@pytest.fixture(scope="module")
def trained():
    model, variables = network(CLASSES, axis_name=meshes.AXIS)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (COUNT, 16, 16, 3)).astype(np.float32)
    logits = model.clone(axis_name=None).apply(variables, (images - 128) / 128)
    return model, variables, images, np.asarray(logits, np.float64)


def answers(trained, labels, *, devices=1, mask=None, loss="softmax", **options):
    model, variables, images, _ = trained
    mesh = meshes.make_mesh(devices)
    step = make_answer_step(model, kind=get_kind("v2"), loss=loss, mesh=mesh, **options)
    mask = np.ones(COUNT, np.float32) if mask is None else mask
    batch = {"image": images, "label": labels, "mask": mask}
    found = jax.jit(step)(variables, jax.device_put(batch, meshes.batch_sharding(mesh)))
    return join_answers([jax.device_get(found)])


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("devices", [1, 4])
def test_answers_are_those_of_the_definition(trained, devices):
    labels = np.arange(COUNT, dtype=np.int32) % CLASSES
    found = answers(trained, labels, devices=devices)
    shares = log_softmax(trained[3])
    right = shares[np.arange(COUNT), labels]
    np.testing.assert_array_equal(found.label, labels)
    np.testing.assert_array_equal(found.best, shares.argmax(-1))
    rank = (shares > right[:, None]).sum(-1)
    np.testing.assert_array_equal(found.rank, np.minimum(rank, 5))
    assert (rank >= 5).any()
    np.testing.assert_allclose(found.confidence, np.exp(shares.max(-1)), rtol=1e-4)
    np.testing.assert_allclose(found.loss, -right, rtol=1e-3, atol=1e-4)
    assert found.known.all()


def test_padding_is_left_out(trained):
    labels = np.arange(COUNT, dtype=np.int32)
    mask = np.asarray([1, 1, 0, 1, 1, 1, 0, 0], np.float32)
    found = answers(trained, labels, mask=mask, devices=4)
    np.testing.assert_array_equal(found.label, labels[mask > 0])


def test_of_several_labels_the_best_placed_counts(trained):
    order = np.argsort(-trained[3], axis=-1)
    labels = np.zeros((COUNT, CLASSES), np.float32)
    for row in range(COUNT):
        labels[row, order[row, [min(row, 4), 8]]] = 1
    found = answers(trained, labels, loss="sigmoid", multilabel=True)
    np.testing.assert_array_equal(found.rank, [0, 1, 2, 3, 4, 4, 4, 4])
    assert (found.label == -1).all()
    expected = 1 / (1 + np.exp(-trained[3].max(-1)))
    np.testing.assert_allclose(found.confidence, expected, rtol=1e-4)


def test_subset_leaves_the_other_outputs_out(trained):
    """Class 1 of the data is none of the network's; classes 0, 2, 3 are its outputs 5, 2, 7."""
    subset = np.asarray([5, -1, 2, 7], np.int32)
    labels = np.arange(COUNT, dtype=np.int32) % 4
    found = answers(trained, labels, subset=subset)
    shares = log_softmax(trained[3][:, [5, 2, 7]])
    np.testing.assert_array_equal(found.best, np.asarray([0, 2, 3])[shares.argmax(-1)])
    np.testing.assert_array_equal(found.known, labels != 1)
    assert (found.rank[labels == 1] == 3).all()  # behind all that the network knows
    at = np.asarray([0, -1, 1, 2])[labels]
    expected = np.where(labels == 1, 0, -shares[np.arange(COUNT), at])
    np.testing.assert_allclose(found.loss, expected, rtol=1e-3, atol=1e-4)
