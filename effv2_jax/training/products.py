"""What a finished run leaves beside its checkpoints: final weights, curves, a summary."""

from collections.abc import Mapping

from effv2_jax.convert.weights_file import save_weights
from effv2_jax.data.kinds import describe
from effv2_jax.training.setup import Setup
from effv2_jax.training.step import TrainState
from effv2_jax.training.workdir import Workdir


def write_final_weights(
    folder: Workdir, setup: Setup, state: TrainState, results: Mapping[str, float]
) -> None:
    """Writes final.safetensors: the moving average, or the raw weights if there is none.

    Args:
        folder: the workdir.
        setup: the parts of the run.
        state: after the last step.
        results: metrics of the last evaluation, kept in the file's header.
    """
    average = bool(setup.recipe.ema_decay)
    raw = {"params": state.params, "batch_stats": state.batch_stats}
    info = {
        "image_size": setup.eval_size,
        "preprocessing": describe(setup.config.data.preprocessing, setup.eval_size),
        "labels": _labels(setup),
        "source": {
            "framework": "effv2_jax",
            "file": str(folder.path.name),
            "sha256": None,
            "weights": "ema" if average else "raw",
            "loss": setup.config.train.loss,  # what its logits mean: inference/weights.py
        },
        "metrics": dict(results),
    }
    save_weights(folder.final_weights, setup.model, state.ema if average else raw, info)


def write_curves(folder: Workdir) -> None:
    """Draws curves.png from metrics.jsonl."""
    from effv2_jax.report.curves import plot_curves  # here: matplotlib takes half a second

    plot_curves(folder.path)


def summary(folder: Workdir, results: Mapping[str, float], *, seconds: float) -> str:
    """Returns the last line of a run.

    Args:
        folder: the workdir.
        results: metrics of the last evaluation.
        seconds: wall time of this process's part of the run.
    """
    shown = [
        f"{label} {100 * results[key]:.2f}%"
        for key, label in (
            ("top1", "top-1"),
            ("ema_top1", "top-1 of the moving average"),
            ("ema_top5", "top-5"),
        )
        if key in results
    ]
    return (
        f"done in {seconds:.0f} s: {', '.join(shown)}; weights {folder.final_weights}, "
        f"curves {folder.path / 'curves.png'}"
    )


def _labels(setup: Setup) -> list[str] | None:
    names = setup.train_source.label_names
    if names is None or len(names) != setup.recipe.num_classes:
        return None
    return list(names)
