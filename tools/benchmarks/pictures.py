"""Pictures of measurements, each from the records of one kind."""

import itertools
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from benchmarks.results import Record
from benchmarks.roofline import has_kernels, kernel_times

# Okabe and Ito's colours, which colour-blind people tell apart too; the first is this project.
_COLOURS = {
    "effv2_jax": "#0072B2",
    "timm": "#D55E00",
    "torchvision": "#CC79A7",
    "keras-tf": "#009E73",
    "keras-jax": "#E69F00",
}
_INK, _FAINT, _GRID = "#2b2f36", "#6b7280", "#dfe4ea"
_FORWARD, _BACKWARD = "#56B4E9", "#0072B2"
_LAYERS = (*list(_COLOURS.values())[1:], "#56B4E9", "#F0E442", _INK)
_MODE = {"train": "training", "infer": "inference"}


def speed(found: Sequence[Record], key: str) -> Figure:
    """Images per second against "image_size" or "batch": a row per mode, a column per core count.

    Args:
        found: records of steps of one model and type; the other of the two sizes is one value.
        key: of the horizontal axis.
    """
    modes = [mode for mode in _MODE if any(r["mode"] == mode for r in found)]
    cores = sorted({record["cores"] for record in found})
    figure = _figure(4.6 * len(cores) + 0.6, 3.1 * len(modes) + 1.1)
    axes = figure.subplots(len(modes), len(cores), squeeze=False, sharex=True, sharey="row")
    for (row, mode), (column, count) in itertools.product(enumerate(modes), enumerate(cores)):
        axis = axes[row, column]
        _style(axis)
        chosen = [r for r in found if (r["mode"], r["cores"]) == (mode, count)]
        for who in dict.fromkeys((r["framework"], r["lowering"]) for r in chosen):
            _speed_line(axis, [r for r in chosen if (r["framework"], r["lowering"]) == who], key)
        axis.set_yscale("log")
        if row == 0:
            axis.set_title(f"{count} core{'s' * (count > 1)}", color=_INK, fontsize=10)
        if row == len(modes) - 1:
            axis.set_xlabel("pixels" if key == "image_size" else "batch", color=_INK)
        if column == 0:
            axis.set_ylabel(f"{_MODE[mode]}, images/s", color=_INK)
        values = sorted({record[key] for record in found})
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(ScalarFormatter())
        rates = [rate for record in found if record["mode"] == mode for rate in record["range"]]
        axis.set_ylim(min(rates) / 1.15, max(rates) * 1.15)
        _ticks(axis.yaxis, *axis.get_ylim())
    first = found[0]
    other = f"batch {first['batch']}" if key == "image_size" else f"{first['image_size']} px"
    _title(figure, f"{first['model']}, {first['dtype']}, {other}", first["device"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _speed_line(axis: Axes, records: Sequence[Record], key: str) -> None:
    records = sorted(records, key=lambda record: record[key])
    rates = [record["images_per_second"] for record in records]
    low = [rate - r["range"][0] for rate, r in zip(rates, records, strict=True)]
    high = [r["range"][1] - rate for rate, r in zip(rates, records, strict=True)]
    first = records[0]
    plain = first["lowering"] in (None, "auto")
    axis.errorbar(
        [record[key] for record in records],
        rates,
        yerr=[low, high],
        label=first["framework"] if plain else f"{first['framework']}, {first['lowering']}",
        color=_COLOURS[first["framework"]],
        linestyle="-" if plain else "--",
        linewidth=2.2 if first["framework"] == "effv2_jax" else 1.4,
        marker="o",
        markersize=4,
        capsize=2.5,
        zorder=3 if first["framework"] == "effv2_jax" else 2,
    )


def _ticks(
    axis: Axis, low: float, high: float, steps: Sequence[float] = (1, 1.5, 2, 3, 5, 7)
) -> None:
    """Ticks of a logarithmic axis at these steps of every power of ten, written out."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [step * 10.0**power for power in powers for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def blocks(found: Sequence[Record]) -> Figure:
    """Time of every part of a network, forward and backward, with the machine's bound.

    Args:
        found: records of the block part, of one network at one size and batch.
    """
    parts = [
        {record["pass"]: record for record in group}
        for _, group in itertools.groupby(found, lambda r: (r["part"], r["block"]))
    ]
    figure = _figure(9.5, 1.9 + 0.36 * len(parts))
    axis = figure.subplots()
    _style(axis, grid="x")
    rows = range(len(parts))
    counts = [part["train"]["count"] for part in parts]
    forward = [n * part["forward"]["ms"] for n, part in zip(counts, parts, strict=True)]
    train = [n * part["train"]["ms"] for n, part in zip(counts, parts, strict=True)]
    backward = [max(0.0, a - b) for a, b in zip(train, forward, strict=True)]
    bound = [n * part["train"]["bound_ms"] for n, part in zip(counts, parts, strict=True)]
    axis.barh(rows, forward, height=0.62, color=_FORWARD, label="forward")
    axis.barh(
        rows, backward, left=forward, height=0.62, color=_BACKWARD, label="backward and update"
    )
    axis.plot(bound, rows, "|", color=_COLOURS["timm"], markersize=15, markeredgewidth=2.2,
              label="least time by the machine's rates")  # fmt: skip
    for row in rows:
        share = bound[row] / train[row]
        _beside(axis, f"{share:.0%}", (max(train[row], bound[row]), row))
    axis.set_xlim(0, 1.08 * max(*train, *bound))
    axis.set_yticks(rows, [_part_name(part["train"]) for part in parts], fontsize=9, color=_INK)
    axis.invert_yaxis()
    axis.set_xlabel("ms of a training step, all blocks of a kind together", color=_INK)
    _title(figure, _what(found[0]), "percent: share of the least time reached")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _beside(axis: Axes, text: str, point: tuple[float, float]) -> None:
    """Writes to the right of a bar's end."""
    axis.annotate(text, point, xytext=(5, 0), textcoords="offset points", va="center",
                  color=_FAINT, fontsize=8.5)  # fmt: skip


def _part_name(record: Record) -> str:
    blocks = f", {record['count']} blocks" if record["count"] > 1 else ""
    return f"{record['part']}{blocks}"


def roofline(found: Sequence[Record]) -> Figure:
    """Rates of layers against operations per byte, and on what each step is spent.

    Args:
        found: records of the roofline part, one per mode.
    """
    figure = _figure(6.6 * len(found), 7.4)
    axes = figure.subplots(2, len(found), squeeze=False, height_ratios=(1.25, 1))
    for column, record in enumerate(found):
        _roof(axes[0, column], record)
        _spent(axes[1, column], record)
    _title(figure, _what(found[0]), "least bytes and operations of every kind of layer")
    return figure


def _roof(axis: Axes, record: Record) -> None:
    _style(axis)
    axis.set_xscale("log")
    axis.set_yscale("log")
    peak, copies = record["matmul_flops"] / 1e9, record["copy_bytes"] / 1e9
    times = kernel_times(record, "layer")
    layers = {
        kind: (row, times[kind])
        for kind, row in record["layers"].items()
        if has_kernels(row, times[kind])
    }
    rows = record["layers"].values()
    whole = {key: sum(row[key] for row in rows) for key in ("operations", "bytes", "bound_ms")}
    layers["whole step"] = whole, record["step_ms"]
    points = []
    for (kind, (row, milliseconds)), colour in zip(layers.items(), _LAYERS, strict=False):
        x, y = row["operations"] / row["bytes"], row["operations"] / milliseconds / 1e6
        points.append((x, y))
        label = f"{kind}  {row['bound_ms'] / milliseconds:.0%}"
        marker = "D" if kind == "whole step" else "o"
        colour = _INK if kind == "whole step" else colour
        axis.plot([x], [y], marker, color=colour, markersize=8, zorder=3, label=label)
    ridge = peak / copies
    low = min(ridge, *(x for x, _ in points)) / 2
    high = max(ridge, *(x for x, _ in points)) * 2
    axis.plot([low, ridge, high], [low * copies, peak, peak], color=_INK, linewidth=1.6)
    roof = f"{peak:,.0f} GFLOP/s in matrix products, {copies:,.1f} GB/s in copies"
    # In the corner above the roof: Winograd's form puts points over its line.
    axis.annotate(roof, (0.01, 0.98), va="top", xycoords="axes fraction",
                  fontsize=8.5, color=_FAINT)  # fmt: skip
    axis.set_xlim(low, high)
    bottom, top = min(y for _, y in points) / 1.6, peak * 1.9
    axis.set_ylim(bottom, top)
    for side, ends in ((axis.xaxis, (low, high)), (axis.yaxis, (bottom, top))):
        _ticks(side, *ends, steps=(1, 2, 5))
    axis.set_xlabel("operations per least byte", color=_INK)
    axis.set_ylabel("GFLOP/s", color=_INK)
    axis.set_title(f"{_MODE[record['mode']]}: {record['step_ms']:,.1f} ms", fontsize=10, color=_INK,
                   loc="right")  # fmt: skip
    axis.legend(frameon=False, fontsize=8.5, title="share of the bound", title_fontsize=8.5,
                loc="center left", bbox_to_anchor=(1, 0.5))  # fmt: skip


def _spent(axis: Axes, record: Record) -> None:
    _style(axis, grid="x")
    times: Mapping = kernel_times(record, "part", "pass")
    totals = kernel_times(record, "part")
    parts = sorted(totals, key=totals.get, reverse=True)
    between = record["step_ms"] - sum(totals.values())
    names = [*parts, *(["no kernel"] if between > 0 else [])]
    forward = [times[part, "forward"] for part in parts] + [between] * (between > 0)
    backward = [times[part, "backward"] for part in parts] + [0.0] * (between > 0)
    axis.barh(range(len(names)), forward, height=0.62, color=_FORWARD, label="forward")
    if any(backward):
        axis.barh(range(len(names)), backward, left=forward, height=0.62, color=_BACKWARD,
                  label="backward")  # fmt: skip
        axis.legend(frameon=False, loc="lower right")
    for row, (a, b) in enumerate(zip(forward, backward, strict=True)):
        _beside(axis, f"{(a + b) / record['step_ms']:.0%}", (a + b, row))
    axis.set_xlim(0, 1.12 * max(a + b for a, b in zip(forward, backward, strict=True)))
    axis.set_yticks(range(len(names)), names, fontsize=9, color=_INK)
    axis.invert_yaxis()
    axis.set_xlabel("ms of a step", color=_INK)


def _what(record: Record) -> str:
    count = record["cores"]
    return (
        f"{record['model']}, {record['image_size']} px, batch {record['batch']}, "
        f"{record['dtype']}, {count} core{'s' * (count > 1)}"
    )


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _title(figure: Figure, title: str, facts: str) -> None:
    figure.suptitle(f"{title}\n", x=0.01, ha="left", color=_INK, fontweight="bold", fontsize=12)
    figure.text(0.01, 0.98 - 0.24 / figure.get_figheight(), facts, color=_FAINT, fontsize=9.5,
                va="top")  # fmt: skip


def _style(axis: Axes, grid: str = "y") -> None:
    axis.grid(axis=grid, color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_FAINT, labelsize=9, length=3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#aab3bf")
