"""Learning rates against the official schedules, and their behaviour under jit."""

import jax
import numpy as np
import pytest

from effv2_jax.training import schedules
from tests import reference


def cases() -> list[dict]:
    return reference.load_json("schedules.json")["learning_rates"]


def make(case: dict) -> schedules.Schedule:
    return schedules.make_schedule(
        case["lr_decay_type"],
        case["initial_lr"],
        total_steps=case["total_steps"],
        steps_per_epoch=case["steps_per_epoch"],
        warmup_epochs=case["warmup_epochs"],
        min_learning_rate=case["minimal_lr"],
        decay_epochs=case["decay_epochs"],
        decay_factor=case["decay_factor"],
    )


def evaluate(schedule: schedules.Schedule, steps) -> np.ndarray:
    """The rates in a compiled program, one step after the other as in training."""
    return jax.jit(lambda n: jax.lax.map(schedule, n))(np.asarray(steps, np.int32))


def test_all_official_learning_rates():
    assert len(cases()) == 48
    for case in cases():
        found = evaluate(make(case), case["steps"])
        np.testing.assert_allclose(found, case["lr"], rtol=1e-6, err_msg=str(case))
        assert found.dtype == np.float32


def test_staircase_falls_where_the_fractional_stair_ends():
    # 736.02 steps a stair: step 736 is still on the first, 737 on the second.
    schedule = schedules.make_schedule(
        "exponential", 1.0, total_steps=1e5, steps_per_epoch=306.67578125
    )
    rates = [float(schedule(step)) for step in (0, 736, 737, 1472, 1473)]
    np.testing.assert_allclose(rates, [1, 1, 0.97, 0.97, 0.97**2], rtol=1e-6)


def test_stairs_end_on_time_whatever_their_length():
    # XLA turns a division by a constant into a multiplication, which is late for 41, 47, 55, ...
    for length in (3, 7, 41, 47, 49, 55, 61, 82, 83, 94, 97):
        schedule = schedules.make_schedule(
            "exponential", 1.0, total_steps=1e5, steps_per_epoch=length, decay_epochs=1
        )
        rates = evaluate(schedule, [length - 1, length, 2 * length - 1, 2 * length])
        np.testing.assert_allclose(rates, [1, 0.97, 0.97, 0.97**2], rtol=1e-6, err_msg=str(length))


def test_warm_up_starts_at_zero_and_may_be_below_the_floor():
    schedule = schedules.make_schedule(
        "constant",
        1.0,
        total_steps=100,
        steps_per_epoch=10,
        warmup_epochs=1.09,
        min_learning_rate=0.5,
    )
    assert schedule(0) == 0
    np.testing.assert_allclose([schedule(step) for step in (1, 9, 10, 11)], [0.1, 0.9, 1, 1])


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'step' is none of exponential"):
        schedules.make_schedule("step", 1.0, total_steps=1)(0)
