"""What the first lines of a run say, and when it evaluates."""

import itertools
import types

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from effv2_jax.data.policy import make_policy
from effv2_jax.errors import UserError
from effv2_jax.training import plan
from effv2_jax.training.compile import Program
from effv2_jax.training.progressive import plan_stages

STAGES = plan_stages(
    num_examples=1000, batch_size=10, epochs=4.0, image_size=64, num_stages=2, min_image_size=32,
    magnitude=15.0, dropout_rate=0.3, mixup_alpha=0.5, preset="paper",
)  # fmt: skip


RANDAUGMENT = make_policy("randaugment")


def program(memory):
    return Program("", None, 1.0, memory)


def cells(line):
    return " ".join(line.split())


def test_memory_of_compiled_stages_is_measured_and_of_others_scaled_with_pixels():
    known = {(32, 10): program(1000)}
    first, second = plan.stage_memory(STAGES, known, state_bytes=200)
    assert first == plan.StageMemory(1000, estimated=False)
    assert second == plan.StageMemory(200 + 4 * 800, estimated=True)  # twice the side


def test_memory_is_measured_once_all_are_compiled():
    known = {(32, 10): program(1000), (64, 10): program(3000)}
    assert plan.stage_memory(STAGES, known, state_bytes=200) == (
        plan.StageMemory(1000, estimated=False),
        plan.StageMemory(3000, estimated=False),
    )


def test_memory_is_unknown_where_the_backend_does_not_say():
    memory = plan.stage_memory(STAGES, {(32, 10): program(None)}, state_bytes=200)
    assert {need.bytes for need in memory} == {None}
    assert "unknown" in plan.plan_table(STAGES, memory, policy=RANDAUGMENT)


def test_table_has_all_of_a_stage_and_marks_estimates():
    memory = plan.stage_memory(STAGES, {(32, 10): program(2 * 10**9)}, state_bytes=0)
    table = plan.plan_table(STAGES, memory, policy=RANDAUGMENT)
    heading, first, second, total, note = table.splitlines()

    assert cells(heading) == (
        "stage image batch magnitude dropout mixup cutmix steps epochs images memory"
    )
    assert cells(first) == "1 32 px 10 5 0.1 0 0 200 2.00 2,000 2.00 GB"
    assert cells(second) == "2 64 px 10 15 0.3 0.5 0 200 2.00 2,000 ~8.00 GB"
    assert cells(total) == "all 400 4.00 4,000"
    assert "estimated" in note


@pytest.mark.parametrize("name", ["none", "autoaugment"])
def test_magnitudes_that_nothing_uses_are_not_told(name):
    policy = make_policy(name)
    memory = plan.stage_memory(STAGES, {(32, 10): program(10**9)}, state_bytes=0)
    second = plan.plan_table(STAGES, memory, policy=policy).splitlines()[2]
    assert cells(second).startswith("2 64 px 10 - 0.3 0.5 0 ")
    assert plan.strengths(STAGES[1], policy)["magnitude"] == "-"
    assert plan.strengths(STAGES[1], make_policy("ra_aa"))["magnitude"] == "15"


def test_rows_say_which_figures_are_estimates():
    memory = plan.stage_memory(STAGES, {(32, 10): program(1000)}, state_bytes=200)
    rows = plan.plan_rows(STAGES, memory)
    assert [row["memory_estimated"] for row in rows] == [False, True]
    assert [row["images"] for row in rows] == [2000, 2000]
    assert [row["image_size"] for row in rows] == [32, 64]


def test_stage_that_does_not_fit_is_warned_of():
    memory = plan.stage_memory(STAGES, {(32, 10): program(2 * 10**9)}, state_bytes=0)
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 5 * 10**9})
    (warning,) = plan.memory_warnings(STAGES, memory, device=device)
    assert "stage 2 needs ~8.00 GB" in warning
    assert "5.00 GB" in warning
    unlimited = types.SimpleNamespace(memory_stats=lambda: None)
    assert plan.memory_warnings(STAGES, memory, device=unlimited) == []


def test_evaluations_are_at_epochs_and_at_ends_of_stages():
    steps = plan.evaluation_steps(STAGES, num_examples=1000, every_epochs=1.5)
    assert sorted(steps) == [150, 200, 300, 400]
    # Stages of 2 epochs: the evaluations of epochs 1.9 and 2.1 would adjoin that of the end.
    steps = plan.evaluation_steps(STAGES, num_examples=1000, every_epochs=0.95)
    assert sorted(steps) == [95, 200, 285, 400]
    steps = plan.evaluation_steps(STAGES, num_examples=1000, every_epochs=0.7)
    assert sorted(steps) == [70, 140, 200, 280, 350, 400]
    assert sorted(plan.evaluation_steps(STAGES, num_examples=1000, every_epochs=0)) == [200, 400]


@settings(max_examples=60, deadline=None)
@given(
    num_examples=st.integers(10, 500),
    epochs=st.floats(2, 10),
    every=st.floats(0.05, 3),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_evaluations_are_at_most_half_a_distance_late(num_examples, epochs, every, batches):
    try:
        stages = plan_stages(
            num_examples=num_examples, batch_size=batches[0], epochs=epochs, image_size=32,
            batch_sizes=batches, preset="none",
        )  # fmt: skip
    except UserError:  # a stage without a step: no plan to evaluate
        assume(False)
    steps = plan.evaluation_steps(stages, num_examples=num_examples, every_epochs=every)
    assert max(steps) == stages[-1].end_step
    assert min(steps) >= 1
    for stage in stages:
        marks = sorted({s for s in steps if stage.start_step < s <= stage.end_step})
        assert marks[-1] == stage.end_step
        # A quarter is left out behind the start and one before the end, at most; and a batch, since
        # an epoch may end within a step.
        seen = [stage.start_step, *marks]
        gaps = [(b - a) * stage.batch_size for a, b in itertools.pairwise(seen)]
        assert max(gaps) <= 1.5 * every * num_examples + stage.batch_size
