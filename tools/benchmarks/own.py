"""This project as a contestant, and the machine it computes on."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import contest
from benchmarks.results import OWN, Case

NUM_CLASSES = 1000


def task_of(case: Case) -> dict[str, Any]:
    """What every contestant of a case is told."""
    return {
        "model": case.model,
        "num_classes": NUM_CLASSES,
        "image_size": case.image_size,
        "batch": case.batch,
        "dtype": case.dtype,
        "mode": case.mode,
    }


def contestant(
    case: Case,
    flags: argparse.Namespace,
    *,
    lowering: str = "auto",
    contestants: int = 1,
    overrides: Mapping[str, str] | None = None,
) -> contest.Contestant:
    """Returns this project as it takes part.

    Args:
        case: what is measured.
        flags: devices, cache and no_tune.
        lowering: how convolutions are computed.
        contestants: who share the accelerator's memory.
        overrides: of the config that the case names.
    """
    task = {
        **task_of(case),
        "recipe": case.recipe,
        "config": case.recipe if case.stage is not None else "",
        "overrides": dict(overrides or {}),
        "stage": case.stage,
        "devices": flags.devices,
        "cache": flags.cache,
        "lowering": lowering,
    }
    return contest.Contestant(
        name=OWN,
        command=command("effv2_worker.py", flags),
        task=task,
        environment=_accelerator_share(contestants),
        asked={"lowering": lowering, "devices": flags.devices, "tuned": not flags.no_tune},
    )


def command(worker: str, flags: argparse.Namespace) -> tuple[str, ...]:
    """The command of a worker of this project."""
    return contest.start(worker, sys.executable, *(("--no-tune",) if flags.no_tune else ()))


def cores_of(count: int) -> list[int]:
    """The last cores: the system's own work prefers the first."""
    return contest.usable_cores()[-count:]


def measure_machine(flags: argparse.Namespace, cores: Sequence[int]) -> dict[str, Any]:
    """What the machine reaches with these cores: matrix products and copies."""
    asked = contest.Contestant(
        name="the machine",
        command=command("rates_worker.py", flags),
        task={"devices": flags.devices, "dtypes": flags.dtype},
    )
    environment = contest.environment_of(asked, {})
    with contest.Worker(asked, cores=cores, environment=environment) as worker:
        return worker.ask("prepare", **asked.task)


def _accelerator_share(contestants: int) -> dict[str, str]:
    """JAX takes three quarters of an accelerator's memory for itself; others need some too."""
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.75 if contestants == 1 else 0.9 / contestants:.2f}"
    }
