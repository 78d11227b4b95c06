"""When a command joins other processes, and what it says if it cannot.

That joined processes train together is shown with real ones in test_resume.py.
"""

import jax
import pytest

from effv2_jax.errors import UserError
from effv2_jax.training.mesh import join_processes

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1234"}
NUMBERS = {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of jax.distributed.initialize, which does nothing else."""
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: made.append(arguments))
    return made


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # sbatch, no srun
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_without_a_sign_of_others_the_process_is_alone(environment, calls):
    join_processes("auto", environment)
    assert calls == []


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "t0,t1"},
    ],
)
def test_jax_finds_the_processes_of_launchers_and_pods(environment, calls):
    join_processes("auto", environment)
    assert calls == [{}]
    join_processes("off", environment)
    assert calls == [{}]


def test_processes_named_by_hand_are_joined(calls):
    join_processes("auto", ADDRESS | NUMBERS)
    assert calls == [{"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}]


@pytest.mark.parametrize(
    "environment", [ADDRESS, NUMBERS, ADDRESS | NUMBERS | {"JAX_PROCESS_ID": "first"}]
)
def test_incomplete_addresses_are_refused(environment, calls):
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROC"):
        join_processes("auto", environment)
    assert calls == []


def test_unreachable_processes_are_one_clear_error(monkeypatch):
    def refuse(**_):
        raise RuntimeError("deadline exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=r"deadline exceeded; set .*runtime\.distributed=off"):
        join_processes("auto", ADDRESS | NUMBERS)
