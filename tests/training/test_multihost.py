"""Two real processes, each with a device of its own, make one run."""

import signal
import socket

import numpy as np
import pytest

from tests.training import tiny

pytestmark = pytest.mark.slow


def train_on_two(workdir, *, die_at=0, signal_number=0):
    """Trains; returns exit code and output of both processes. Only process 1 gets the signal."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    config = tiny.tiny_config(**{"runtime.devices": 2})
    signals = ({}, {"die_at": die_at, "signal_number": signal_number})
    processes = [
        tiny.start_process(config, workdir, cluster=(address, 2, index), **signals[index])
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    codes, printed = train_on_two(workdir)
    assert codes == [0, 0], printed
    return workdir, printed


def test_two_processes_learn_what_one_learns(run_of_two, finished_run):
    workdir, _ = run_of_two
    one, two = tiny.records(finished_run.workdir), tiny.records(workdir)
    assert [(r["split"], r["step"]) for r in two] == [(r["split"], r["step"]) for r in one]
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)  # order of float32 sums
    weights = tiny.final_weights(finished_run.workdir)
    for name, value in tiny.final_weights(workdir).items():
        scale = max(np.abs(weights[name]).max(), 1e-2)
        np.testing.assert_allclose(value, weights[name], atol=1e-4 * scale, err_msg=name)


def test_only_the_first_process_prints(run_of_two):
    _, (first, second) = run_of_two
    assert "stage 1/3" in first
    assert "done in" in first
    assert "stage 1/3" not in second


def test_signal_to_one_process_ends_both_with_the_state_saved(run_of_two, tmp_path):
    codes, printed = train_on_two(tmp_path, die_at=11, signal_number=signal.SIGTERM)
    # The one without a signal of its own was told by the other.
    assert codes[1] == 128 + signal.SIGTERM, printed
    assert codes[0] == 128 + signal.SIGTERM, printed
    assert "after step 12" in printed[0]  # they agree where a record is due
    codes, printed = train_on_two(tmp_path)
    assert codes == [0, 0], printed
    undisturbed, _ = run_of_two
    tiny.assert_equal_bits(tiny.final_weights(tmp_path), tiny.final_weights(undisturbed))
    assert tiny.records(tmp_path) == tiny.records(undisturbed)
