"""Learning curves of a run, from its metrics.jsonl alone.

python -m effv2_jax.report.curves WORKDIR [WORKDIR ...] [--out FILE]
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effv2_jax.atomic import replacing
from effv2_jax.errors import UserError


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a last line that is still being written is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def plot_curves(workdir: str | Path, *, out: str | Path | None = None) -> Path:
    """Draws loss, top-1 and learning rate over the epochs; returns the picture's path."""
    return _draw([Path(workdir)], Path(out) if out else Path(workdir) / "curves.png")


def _draw(workdirs: Sequence[Path], out: Path) -> Path:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    for workdir in workdirs:
        path = workdir / "metrics.jsonl"
        if not path.exists():
            raise UserError(f"{workdir}: no metrics.jsonl; give the workdir of a run")
        records = read_metrics(path)
        for axis, keys in zip(
            axes, (("loss",), ("top1", "ema_top1"), ("learning_rate",)), strict=True
        ):
            for split in ("train", "eval"):
                for key in keys:
                    points = [
                        (r["epoch"], r[key])
                        for r in records
                        if r["split"] == split and r.get(key) is not None
                    ]
                    if points:
                        axis.plot(*zip(*points, strict=True), label=f"{split} {key}")
            axis.set_ylabel(keys[0])
            axis.legend()
    axes[-1].set_xlabel("epoch")
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return out
