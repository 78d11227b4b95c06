"""Metrics over answers: definitions worked out by hand, and what may not matter to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effv2_jax.training.metrics import (
    Answers,
    calibration,
    class_rows,
    confusions,
    expected_calibration_error,
    summary,
)


def answers(label, best, *, rank=None, confidence=None, loss=None, known=None):
    count = len(label)
    label, best = np.asarray(label), np.asarray(best)
    return Answers(
        label=label,
        best=best,
        rank=np.where(label == best, 0, 5) if rank is None else np.asarray(rank),
        confidence=np.asarray(np.full(count, 0.9) if confidence is None else confidence),
        loss=np.asarray(np.zeros(count) if loss is None else loss),
        known=np.asarray(np.ones(count, bool) if known is None else known),
    )


def test_summary_counts():
    found = summary(
        answers([0, 1, 2, 2], [0, 0, 2, 1], rank=[0, 1, 0, 5], loss=[1.0, 2.0, 3.0, 6.0])
    )
    assert (found["examples"], found["top1_right"], found["top5_right"]) == (4, 2, 3)
    assert (found["top1"], found["top5"], found["loss"]) == (0.5, 0.75, 3.0)


def test_examples_of_a_class_that_the_network_lacks_are_wrong_and_without_loss():
    found = summary(answers([0, 1], [0, 0], loss=[2.0, 0.0], known=[True, False]))
    assert (found["top1"], found["loss"]) == (0.5, 2.0)


def test_calibration_error_of_an_example_worked_out_by_hand():
    # Two bins of ten: three answers of 0.95 of which one is wrong, one of 0.55 that is right.
    found = answers([0, 0, 0, 0], [0, 0, 1, 0], confidence=[0.95, 0.95, 0.95, 0.55])
    bins = calibration(found, bins=10)
    assert [(b.count, b.accuracy) for b in bins if b.count] == [(1, 1.0), (3, pytest.approx(2 / 3))]
    expected = 3 / 4 * abs(2 / 3 - 0.95) + 1 / 4 * abs(1 - 0.55)
    assert expected_calibration_error(bins) == pytest.approx(expected, rel=1e-12)


def test_bins_are_open_below_and_closed_above():
    confidence = [0.0, 0.25, 0.2500001, 0.5, 1.0]
    bins = calibration(answers([0] * 5, [0] * 5, confidence=confidence), bins=4)
    assert [b.count for b in bins] == [2, 2, 0, 1]


def test_error_is_zero_where_confidence_is_accuracy():
    found = answers([0, 0, 0, 0], [0, 0, 0, 1], confidence=[0.75] * 4)
    assert summary(found)["ece"] == pytest.approx(0, abs=1e-12)


def test_rows_and_confusions():
    found = confusions(answers([0, 0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 0, 1, 2]))
    assert found == [(0, 0, 1), (0, 1, 2), (1, 1, 1), (2, 0, 1), (2, 1, 1), (2, 2, 1)]
    rows = class_rows(found, 4)
    assert [(r.examples, r.right, r.answered) for r in rows] == [
        (3, 1, 2), (1, 1, 4), (3, 1, 1), (0, 0, 0),
    ]  # fmt: skip
    assert [(r.mistaken_for, r.mistaken) for r in rows] == [(1, 2), (None, 0), (0, 1), (None, 0)]
    assert rows[0].accuracy == 1 / 3
    assert rows[1].precision == 1 / 4
    assert rows[3].accuracy is rows[3].precision is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000), st.integers(2, 7))
def test_order_of_the_examples_does_not_matter(count, seed, classes):
    rng = np.random.default_rng(seed)
    label, best = rng.integers(0, classes, (2, count))
    confidence = rng.random(count).astype(np.float32)
    loss = rng.random(count).astype(np.float32)
    order = rng.permutation(count)
    one = answers(label, best, confidence=confidence, loss=loss)
    other = answers(label[order], best[order], confidence=confidence[order], loss=loss[order])
    assert confusions(one) == confusions(other)
    assert summary(one) == pytest.approx(summary(other), rel=1e-12)
    assert [b.count for b in calibration(one)] == [b.count for b in calibration(other)]
    rows = class_rows(confusions(one), classes)
    assert sum(row.examples for row in rows) == sum(row.answered for row in rows) == count
