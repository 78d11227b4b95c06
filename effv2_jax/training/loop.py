"""Training and evaluating from a config: the order in which things happen.

What is done between two steps is in `run.py`. The state is all that a run carries: everything
random follows from (seed, step), the batches too, so that a run that was stopped anywhere
continues as if nothing had happened.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from effv2_jax.config import validate
from effv2_jax.convert.weights_file import load_weights
from effv2_jax.errors import UserError
from effv2_jax.startup import enable_compilation_cache
from effv2_jax.training import mesh as meshes
from effv2_jax.training import setup
from effv2_jax.training.checkpoint import Checkpoints
from effv2_jax.training.compile import Programs
from effv2_jax.training.evaluate import Evaluator
from effv2_jax.training.run import Run
from effv2_jax.training.signals import StopRequest
from effv2_jax.training.step import TrainState, make_eval_step
from effv2_jax.training.workdir import open_workdir


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


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of the workdir or, without one, the file init.weights.

    Reads only: a run may be training in the workdir meanwhile.

    Args:
        config: complete; data and eval say what is evaluated and how.
        workdir: folder of a run; for init.weights one that does not exist.

    Returns:
        The metrics: loss, top1, top5 and, of a checkpoint, ema_loss, ema_top1, ema_top5.

    Raises:
        UserError: config, data or devices are wrong, or there are no weights.
    """
    validate(config)
    meshes.join_processes(config.runtime.distributed)
    enable_compilation_cache(config.runtime.compilation_cache)
    parts = setup.prepare(config)
    state = _from_checkpoint(parts, Path(workdir))
    if state is not None:
        weights = setup.evaluated_variables(config, state)
        name = f"checkpoint of step {int(state.step)}"
    elif config.init.weights:
        parts, weights = _from_file(parts)
        name = config.init.weights
    else:
        raise UserError(
            f"--workdir {workdir}: no checkpoint to evaluate; train there first, or name a weights "
            "file with --config.init.weights=FILE"
        )
    with Programs(background=False) as programs:
        evaluator = Evaluator(
            make_eval_step(parts.mesh_model, parts.recipe, mesh=parts.mesh),
            source=parts.eval_source,
            data_config=config.data,
            image_size=parts.eval_size,
            batch_size=parts.eval_batch_size,
            mesh=parts.mesh,
            programs=programs,
        )
        results = evaluator(weights)
    print(f"{name}: {len(parts.eval_source):,} examples at {parts.eval_size} px")
    for metric, value in results.items():
        print(f"  {metric:10} {value:.6f}" if "loss" in metric else f"  {metric:10} {value:.4%}")
    return results


def _from_file(parts: setup.Setup) -> tuple[setup.Setup, dict[str, Any]]:
    """Returns the parts with the network of the file init.weights, and its variables."""
    path, kind = parts.config.init.weights, parts.config.data.preprocessing
    model, variables, info = load_weights(path)
    if model.num_classes != parts.recipe.num_classes:
        raise UserError(
            f"init.weights = {path}: has {model.num_classes} classes, the data set has "
            f"{parts.recipe.num_classes}: evaluate it on the data set it was trained for"
        )
    made_with = (info["preprocessing"] or {}).get("kind", kind)
    if made_with != kind:
        raise UserError(
            f"init.weights = {path}: made for data.preprocessing = {made_with!r}, the config has "
            f"{kind!r}: set --config.data.preprocessing={made_with}"
        )
    model = model.clone(dtype=parts.model.dtype, lowering=parts.model.lowering)
    parts = dataclasses.replace(parts, model=model)
    return parts, {"": meshes.put_replicated(variables, parts.mesh)}


def _from_checkpoint(parts: setup.Setup, workdir: Path) -> TrainState | None:
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return None
    with Checkpoints(folder, read_only=True) as checkpoints:
        sharding = meshes.replicated(parts.mesh)
        return checkpoints.restore(setup.state_shapes(parts), sharding=sharding)
