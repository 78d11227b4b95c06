"""A run that was ended anywhere, and started again, ends in the same bits.

Augmentation, mixup, CutMix, dropout, drop path and the moving average are on. The signals are
real ones, the processes too.
"""

import re
import signal

import numpy as np
import pytest

from tests.training import tiny

TERM, KILL = signal.SIGTERM, signal.SIGKILL


def interrupted_run(workdir, ends):
    """Runs until done, each process ended as `ends` says: (after step, by signal)."""
    config = tiny.tiny_config()
    for step, number in ends:
        code, printed = tiny.run_in_process(config, workdir, die_at=step, signal_number=number)
        assert code == (128 + number if number == TERM else -number), printed
        if number == TERM:
            assert f"stopped by signal {int(TERM)} after step {step}" in printed
    code, printed = tiny.run_in_process(config, workdir)
    assert code == 0, printed
    return printed


def assert_same_end(workdir, undisturbed):
    config = tiny.tiny_config()
    tiny.assert_equal_bits(tiny.final_weights(workdir), tiny.final_weights(undisturbed))
    tiny.assert_equal_bits(tiny.saved_state(config, workdir), tiny.saved_state(config, undisturbed))
    assert tiny.records(workdir) == tiny.records(undisturbed)


def test_run_ended_by_sigterm_and_by_kill_9_equals_the_undisturbed_one(tmp_path, finished_run):
    # SIGTERM within stage 1; kill -9 within stage 3, after a checkpoint that may still be written.
    printed = interrupted_run(tmp_path, [(5, TERM), (20, KILL)])
    assert 5 <= int(re.search(r"continuing after step (\d+)", printed)[1]) <= 18
    assert_same_end(tmp_path, finished_run.workdir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [TERM, KILL])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_run_ended_in_any_stage_equals_the_undisturbed_one(tmp_path, finished_run, stage, number):
    # First and last step of the stage, one within it; never where a checkpoint is due anyway.
    steps = [8 * stage + 1, 8 * stage + 5, 8 * stage + 8]
    interrupted_run(tmp_path, [(step, number) for step in steps])
    assert_same_end(tmp_path, finished_run.workdir)


@pytest.mark.slow
def test_run_killed_five_times_equals_the_undisturbed_one(tmp_path, finished_run):
    interrupted_run(tmp_path, [(step, KILL) for step in (2, 7, 11, 16, 23)])
    assert_same_end(tmp_path, finished_run.workdir)


def test_finished_run_is_not_trained_again(tmp_path, finished_run, capsys):
    from effv2_jax.training import loop

    before = tiny.final_weights(finished_run.workdir)
    records = tiny.records(finished_run.workdir)
    results = loop.train(tiny.tiny_config(), finished_run.workdir)
    assert "nothing left to train" in capsys.readouterr().out
    assert results == pytest.approx(finished_run.results)
    tiny.assert_equal_bits(tiny.final_weights(finished_run.workdir), before)
    assert tiny.records(finished_run.workdir) == records


def test_runs_with_other_seeds_differ(finished_run, tmp_path):
    # The comparisons above would hold for a run that ignores everything random.
    from effv2_jax.training import loop

    loop.train(tiny.tiny_config(**{"train.seed": 1}), tmp_path)
    kernel = "params/classifier/kernel"
    mine, other = tiny.final_weights(finished_run.workdir), tiny.final_weights(tmp_path)
    assert not np.array_equal(mine[kernel], other[kernel])
