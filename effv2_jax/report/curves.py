"""Learning curves of a run, from its metrics.jsonl alone.

    python -m effv2_jax.report.curves WORKDIR [--out curves.png]
    python -m effv2_jax.report.curves WORKDIR WORKDIR ... --out comparison.png

One run: loss, top-1 and learning rate over the epochs, with the stages shaded and labelled with
their image size. Several runs: the same, a colour for each.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from effv2_jax.atomic import replacing
from effv2_jax.command import Parser, exit_code
from effv2_jax.errors import UserError
from effv2_jax.report.run import Run, read_run

# Okabe and Ito's colours, which colour-blind people tell apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_RAW, _EMA = _COLOURS[:2]
_TRAIN = "#8a94a3"
_INK, _FAINT = "#2b2f36", "#6b7280"
_STAGE = ("#f1f4f8", "#ffffff")

# Text so many points above a panel, at a share of its width.
_ABOVE = {"xycoords": "axes fraction", "textcoords": "offset points"}

_FEW = 30  # up to so many points each gets a mark
_SMOOTH_FROM = 60  # from so many training points on they are faint, under their running mean


def plot_curves(
    workdir: str | Path | Sequence[str | Path], *, out: str | Path | None = None
) -> Path:
    """Draws the learning curves of a run, or of several over each other.

    Args:
        workdir: folder of a run, or several.
        out: the picture; None: curves.png in the (first) workdir.

    Returns:
        The picture's path.

    Raises:
        UserError: a workdir has no measurements.
    """
    workdirs = [workdir] if isinstance(workdir, str | Path) else list(workdir)
    runs = [read_run(each) for each in workdirs]
    path = Path(workdirs[0]) / "curves.png" if out is None else Path(out)
    figure = draw_curves(runs)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=150)
    return path


@dataclasses.dataclass(frozen=True)
class _Curve:
    """One line of a panel.

    Attributes:
        split: which lines of the file.
        key: which number.
        label: in the legend, of a single run.
        colour: of a single run.
        width: of the line; the lines of one run differ by it when several runs are drawn.
    """

    split: str
    key: str
    label: str
    colour: str
    width: float


_PANELS: tuple[tuple[str, float, tuple[_Curve, ...]], ...] = (
    (
        "loss",
        3.0,
        (
            _Curve("train", "loss", "training", _TRAIN, 1.2),
            _Curve("eval", "loss", "evaluation, raw weights", _RAW, 1.8),
            _Curve("eval", "ema_loss", "evaluation, moving average", _EMA, 1.8),
        ),
    ),
    (
        "top-1",
        3.0,
        (
            _Curve("train", "top1", "training", _TRAIN, 1.2),
            _Curve("eval", "top1", "evaluation, raw weights", _RAW, 1.8),
            _Curve("eval", "ema_top1", "evaluation, moving average", _EMA, 1.8),
        ),
    ),
    (
        "learning rate",
        1.2,
        (_Curve("train", "learning_rate", "learning rate", _INK, 1.6),),
    ),
)


def draw_curves(runs: Sequence[Run]) -> Figure:
    """Returns the figure of one run, or of several over each other."""
    panels = [
        panel
        for panel in _PANELS
        if any(run.points(curve.split, curve.key) for run in runs for curve in panel[2])
    ] or [_PANELS[0]]
    heights = [height for _, height, _ in panels]
    figure = Figure(figsize=(9, 1.4 + 1.05 * sum(heights)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    last_epoch = max(record["epoch"] for run in runs for record in run.records)
    axes[0].set_xlim(0, 1.012 * last_epoch or 1)  # room for the last mark
    for axis, (name, _, curves) in zip(axes, panels, strict=True):
        _style(axis, name)
        for run, colour in zip(runs, itertools.cycle(_COLOURS)):
            for curve in _wanted(run, curves, alone=len(runs) == 1):
                _draw_curve(axis, run, curve, None if len(runs) == 1 else colour)
        _limit(axis, name)
    axes[-1].set_xlabel("epoch", color=_INK)
    spans = [run.stages() for run in runs]
    if all(span == spans[0] for span in spans):
        _draw_stages(axes, spans[0])
    if len(runs) == 1:
        _mark_best(axes, panels, runs[0])
        axes[0].set_title(_name(runs[0]), loc="left", color=_INK, fontweight="bold", pad=58)
        axes[0].annotate(
            _facts(runs[0]), (0, 1), xytext=(0, 42), color=_FAINT, fontsize=9.5, **_ABOVE
        )
        handles = axes[0].get_legend_handles_labels()[0]
    else:
        handles = [
            Line2D([], [], color=colour, linewidth=2, label=_run_label(run))
            for run, colour in zip(runs, itertools.cycle(_COLOURS))
        ]
    _legend(axes[0], handles)
    return figure


def _wanted(run: Run, curves: Sequence[_Curve], *, alone: bool) -> list[_Curve]:
    """The curves to draw: of several runs only the training and the better evaluation."""
    found = [curve for curve in curves if run.points(curve.split, curve.key)]
    if alone:
        return found
    evaluated = [curve for curve in found if curve.split == "eval"]
    return evaluated[-1:] or found[:1]


def _draw_curve(axis: Axes, run: Run, curve: _Curve, colour: str | None) -> None:
    points = run.points(curve.split, curve.key)
    epochs, values = zip(*points, strict=True)
    style = {"color": colour or curve.colour, "solid_capstyle": "round"}
    label = curve.label if colour is None else None
    noisy = len(points) >= _SMOOTH_FROM and curve.split == "train" and curve.key != "learning_rate"
    if noisy:
        axis.plot(epochs, values, linewidth=0.6, alpha=0.35, **style)
        # Each stage for itself: what changes between two stages is meant to be seen.
        values = [
            value
            for start, end, _ in run.stages()
            for value in _running_mean(
                [value for epoch, value in points if start < epoch <= end or epoch == start == 0],
                window=max(3, len(points) // 40),
            )
        ]
    axis.plot(
        epochs,
        values,
        label=label,
        linewidth=curve.width,
        marker="o" if len(points) <= _FEW and curve.key != "learning_rate" else None,
        markersize=3.5 if len(points) > 1 else 6,
        zorder=2 if curve.split == "train" else 3,
        **style,
    )


def _draw_stages(axes: Sequence[Axes], spans: Sequence[tuple]) -> None:
    """Shades the stages in every panel and writes their image sizes above the first."""
    if not any(size for _, _, size in spans):
        return
    whole = axes[0].get_xlim()[1]
    room = -0.02
    for index, (start, end, size) in enumerate(spans):
        for axis in axes:
            axis.axvspan(start, end, color=_STAGE[index % 2], linewidth=0, zorder=0)
            if index:
                axis.axvline(start, color="#c9d1db", linewidth=0.8, zorder=1)
        middle = (start + end) / 2 / whole
        text = f"{size} px"
        half = 0.004 * len(text) + 0.004  # of the panel's width, for this size of letters
        if middle - half < room or middle + half > 1.02:
            continue  # it would run into its neighbour
        room = middle + half
        axes[0].annotate(
            text,
            (middle, 1),
            xytext=(0, 4),
            ha="center",
            color=_FAINT,
            fontsize=8.5,
            **_ABOVE,
        )


def _mark_best(axes: Sequence[Axes], panels: Sequence[tuple], run: Run) -> None:
    """Marks the best evaluation in the panel of top-1."""
    best = _best(run)
    for axis, (name, _, _) in zip(axes, panels, strict=True):
        if name != "top-1" or best is None:
            continue
        epoch, value, key = best
        colour = _EMA if key == "ema_top1" else _RAW
        axis.plot([epoch], [value], "o", color=colour, markersize=7, markeredgecolor="white",
                  markeredgewidth=1.2, zorder=5)  # fmt: skip
        share = epoch / axis.get_xlim()[1]
        axis.annotate(
            f"best {100 * value:.2f}%",
            (epoch, value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right" if share > 0.94 else "left" if share < 0.06 else "center",
            color=colour,
            fontsize=9.5,
            fontweight="bold",
            zorder=6,
        )


def _best(run: Run) -> tuple[float, float, str] | None:
    """(epoch, top-1, key) of the best evaluation; of equal ones the earliest."""
    found = [
        (value, -epoch, key)
        for key in ("top1", "ema_top1")
        for epoch, value in run.points("eval", key)
    ]
    if not found:
        return None
    value, epoch, key = max(found)
    return -epoch, value, key


def _facts(run: Run) -> str:
    last = run.records[-1]
    parts = [f"{last['step']:,} steps", f"{last['epoch']:.4g} epochs"]
    for key, kind in (("ema_top1", "moving average"), ("top1", "raw weights")):
        if points := run.points("eval", key):
            parts.append(f"final top-1 {100 * points[-1][1]:.2f}% ({kind})")
    return "   ".join(parts)


def _name(run: Run) -> str:
    return run.name if len(run.name) <= 64 else f"{run.name[:40]} ... {run.name[-20:]}"


def _run_label(run: Run) -> str:
    best = _best(run)
    return _name(run) if best is None else f"{_name(run)}: best {100 * best[1]:.2f}%"


def _legend(axis: Axes, handles: Sequence[Line2D]) -> None:
    """One legend for all panels, above them, where it hides no curve."""
    axis.legend(
        handles=handles,
        frameon=False,
        fontsize=9.5,
        labelcolor=_INK,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        bbox_transform=axis.transAxes + ScaledTranslation(0, 22 / 72, axis.figure.dpi_scale_trans),
        borderaxespad=0,
        borderpad=0,
        handlelength=1.6,
        ncols=min(3, len(handles)),
    )


def _style(axis: Axes, name: str) -> None:
    axis.set_ylabel(name, color=_INK)
    axis.grid(axis="y", color="#dfe4ea", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_FAINT, labelsize=9, length=3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#aab3bf")
    if name == "learning rate":
        axis.yaxis.set_major_locator(MaxNLocator(4))
    if name == "top-1":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def _limit(axis: Axes, name: str) -> None:
    """Leaves the wild first steps out of the picture, and room above and below."""
    values = sorted(
        value for line in axis.get_lines() for value in line.get_ydata() if math.isfinite(value)
    )
    if not values:
        return
    low, high = values[0], values[-1]
    if name == "loss" and len(values) > 50:
        high = min(high, 1.15 * values[int(0.99 * (len(values) - 1))])
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    floor = 0.0 if low >= 0 else -math.inf
    # Above top-1 there is room for the name of the best, but no tick over 100%.
    axis.set_ylim(max(floor, low - margin), high + (2.5 if name == "top-1" else 1) * margin)
    if name == "top-1":
        ticks = MaxNLocator(6).tick_values(axis.get_ylim()[0], min(1.0, high + margin))
        axis.set_yticks([tick for tick in ticks if axis.get_ylim()[0] <= tick <= 1])


def _running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """Centred mean over `window` values, over fewer at the ends."""
    half = window // 2
    return [
        sum(part) / len(part)
        for part in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    ]


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(
        "Draws learning curves; several workdirs are drawn over each other.",
        prog="python -m effv2_jax.report.curves",
    )
    parser.add_argument("workdir", nargs="+", help="folder of a run")
    parser.add_argument("--out", help="the picture; default: curves.png in the only workdir")
    flags = parser.parse_args(arguments)
    if flags.out is None and len(flags.workdir) > 1:
        raise UserError("several workdirs: say with --out FILE.png where the picture goes")
    print(plot_curves(flags.workdir, out=flags.out))


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
