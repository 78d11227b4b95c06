"""Training and evaluating from a config: the order in which things happen.

What is done between two steps is in `run.py`. The state is all that a run carries: everything
random follows from (seed, step), the batches too, so that a run that was stopped anywhere
continues as if nothing had happened.
"""

import time
from pathlib import Path

from ml_collections import ConfigDict

from effv2_jax.config import validate
from effv2_jax.startup import enable_compilation_cache
from effv2_jax.training import mesh as meshes
from effv2_jax.training import setup
from effv2_jax.training.checkpoint import Checkpoints
from effv2_jax.training.evaluation import evaluate
from effv2_jax.training.run import Run
from effv2_jax.training.signals import StopRequest
from effv2_jax.training.workdir import open_workdir

__all__ = ["evaluate", "train"]


def train(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains, or continues to train, and leaves everything in the workdir.

    Args:
        config: complete; checked here again.
        workdir: folder of the run; made if missing, continued if it has checkpoints.

    Returns:
        The metrics of the last evaluation: loss, top1, top5 and ema_loss, ema_top1, ema_top5.

    Raises:
        UserError: config, data, devices or workdir are wrong.
        run.NonFiniteError: the run diverged.
        SystemExit: 128 + signal, after a signal and after the state was saved.
    """
    started = time.monotonic()
    validate(config)
    meshes.join_processes(config.runtime.distributed)
    enable_compilation_cache(config.runtime.compilation_cache)
    parts = setup.prepare(config)
    with (
        StopRequest() as stop,
        open_workdir(workdir, config) as folder,
        Checkpoints(
            folder.checkpoints,
            keep_last=config.runtime.keep_last,
            keep_best=config.runtime.keep_best,
        ) as checkpoints,
    ):
        shapes = setup.state_shapes(parts)
        state = checkpoints.restore(shapes, sharding=meshes.replicated(parts.mesh))
        state = state or setup.initial_state(parts)
        step = int(state.step)
        with Run(parts, folder, checkpoints, stop, start_step=step, started=started) as run:
            run.announce(state)
            run.evaluate_if_missing(state)
            for stage in parts.stages:
                if run.step < stage.end_step:
                    state = run.train_stage(stage, state)
            return run.finish(state)
