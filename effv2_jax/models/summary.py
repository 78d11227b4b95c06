"""Prints what a network is made of: stages, shapes, parameters, multiply-adds.

    python -m effv2_jax.models.summary efficientnetv2-s [--image-size 300]
    python -m effv2_jax.models.summary --all

Everything is computed from the table of architectures, without building a network; tests hold the
numbers equal to those of the built networks and of the official code.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

from effv2_jax.command import Parser, exit_code
from effv2_jax.errors import UserError
from effv2_jax.models.block_spec import BlockSpec, expand_blocks, round_channels
from effv2_jax.models.variants import get_variant, list_models


class Network(Protocol):
    """What is summarised: a `Variant`, or an `EfficientNet` with overrides."""

    blocks: Sequence[BlockSpec]
    width: float
    depth: float
    feature_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One stage.

    Attributes:
      stage: "stem", "1", ..., "head", "classifier".
      operator: what it consists of.
      blocks: number of blocks; 0 outside the stages.
      output: shape of one example after the stage, (height, width, channels) or (channels,).
      parameters: trainable numbers.
      statistics: moving statistics of the norms.
      multiply_adds: of convolutions and the classifier, for one image.
    """

    stage: str
    operator: str
    blocks: int = 0
    output: tuple[int, ...]
    parameters: int
    statistics: int
    multiply_adds: int


@dataclasses.dataclass
class _Count:
    """Adds up layers while the resolution shrinks; padding "SAME" gives ceil(size / stride)."""

    size: int
    parameters: int = 0
    statistics: int = 0
    multiply_adds: int = 0

    def conv(self, kernel: int, fan_in: int, features: int, *, stride: int = 1) -> None:
        """A convolution without bias; `fan_in` is 1 for a depthwise one."""
        self.size = -(-self.size // stride)
        weights = kernel * kernel * fan_in * features
        self.parameters += weights
        self.multiply_adds += weights * self.size * self.size

    def norm(self, channels: int) -> None:
        """Scale and bias; mean and variance."""
        self.parameters += 2 * channels
        self.statistics += 2 * channels

    def squeeze_excite(self, channels: int, squeezed: int) -> None:
        """Two convolutions with bias on a 1x1 map."""
        if squeezed:
            self.parameters += 2 * channels * squeezed + channels + squeezed
            self.multiply_adds += 2 * channels * squeezed

    def block(self, spec: BlockSpec) -> None:
        """MBConv or FusedMBConv."""
        inner = spec.inner_channels
        if spec.fused and not spec.expands:
            self.squeeze_excite(inner, spec.se_channels)
            self.conv(spec.kernel, inner, spec.channels, stride=spec.stride)
        else:
            if spec.fused:
                self.conv(spec.kernel, spec.in_channels, inner, stride=spec.stride)
                self.norm(inner)
            else:
                if spec.expands:
                    self.conv(1, spec.in_channels, inner)
                    self.norm(inner)
                self.conv(spec.kernel, 1, inner, stride=spec.stride)
                self.norm(inner)
            self.squeeze_excite(inner, spec.se_channels)
            self.conv(1, inner, spec.channels)
        self.norm(spec.channels)

    def row(self, stage: str, operator: str, channels: int, *, blocks: int = 0) -> Row:
        """Closes a stage: returns its row and starts the next at this resolution."""
        row = Row(
            stage=stage,
            operator=operator,
            blocks=blocks,
            output=(self.size, self.size, channels),
            parameters=self.parameters,
            statistics=self.statistics,
            multiply_adds=self.multiply_adds,
        )
        self.parameters = self.statistics = self.multiply_adds = 0
        return row


def _operator(spec: BlockSpec) -> str:
    kind = "FusedMBConv" if spec.fused else "MBConv"
    text = f"{kind}{spec.expand}, {spec.kernel}x{spec.kernel}"
    if spec.stride > 1:
        text += f", stride {spec.stride}"
    return f"{text}, SE {spec.se:g}" if spec.se else text


def summarize(network: Network, *, image_size: int, num_classes: int = 1000) -> tuple[Row, ...]:
    """Returns the stages of a network.

    Args:
      network: a `Variant`, or an `EfficientNet` (with its overrides).
      image_size: side of the square input in pixels.
      num_classes: outputs; 0: no classifier.

    Raises:
      UserError: an image without pixels.
    """
    if image_size < 1:
        raise UserError(f"--image-size is {image_size}; expected at least 1 pixel")
    count = _Count(size=image_size)
    stem = round_channels(network.blocks[0].in_channels, network.width)
    count.conv(3, 3, stem, stride=2)
    count.norm(stem)
    rows = [count.row("stem", "Conv, 3x3, stride 2", stem)]
    for i, spec in enumerate(network.blocks):
        blocks = expand_blocks([spec], width=network.width, depth=network.depth)
        for block in blocks:
            count.block(block)
        channels = blocks[0].channels
        rows.append(count.row(str(i + 1), _operator(spec), channels, blocks=len(blocks)))
    features = round_channels(network.feature_size, network.width)
    count.conv(1, channels, features)
    count.norm(features)
    rows.append(count.row("head", "Conv, 1x1", features))
    if num_classes:
        weights = features * num_classes
        rows.append(
            Row(
                stage="classifier",
                operator="mean over pixels, dense",
                output=(num_classes,),
                parameters=weights + num_classes,
                statistics=0,
                multiply_adds=weights,
            )
        )
    return tuple(rows)


def totals(rows: Iterable[Row]) -> tuple[int, int, int, int]:
    """Returns (blocks, parameters, statistics, multiply-adds) of all rows."""
    rows = tuple(rows)
    keys = ("blocks", "parameters", "statistics", "multiply_adds")
    return tuple(sum(getattr(row, key) for row in rows) for key in keys)


def _table(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligned columns; the first `left` to the left, the others, numbers, to the right."""
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = []
    for line in (head, ["-" * w for w in widths], *body):
        cells = [
            text.ljust(w) if i < left else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_summary(name: str, rows: Sequence[Row], *, image_size: int) -> str:
    """Returns the table of one network as text."""
    blocks, parameters, statistics, multiply_adds = totals(rows)
    body = [
        [
            row.stage,
            row.operator,
            " x ".join(map(str, row.output)),
            str(row.blocks or ""),
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}",
        ]
        for row in rows
    ]
    body.append(["total", "", "", str(blocks), f"{parameters:,}", f"{multiply_adds:,}"])
    head = ["stage", "operator", "output", "blocks", "parameters", "multiply-adds"]
    return (
        f"{name} at {image_size} x {image_size} pixels\n\n{_table(head, body, left=3)}\n\n"
        f"{parameters:,} parameters, {parameters + statistics:,} with the moving statistics of the "
        f"norms;\n{multiply_adds / 1e9:.3f} G multiply-adds for one image (convolutions and dense "
        "layers)."
    )


def format_all() -> str:
    """Returns the table that compares all networks, each at its evaluation size."""
    body = []
    for name in list_models():
        variant = get_variant(name)
        size = variant.eval_size
        blocks, parameters, statistics, multiply_adds = totals(summarize(variant, image_size=size))
        body.append([
            name, str(variant.train_size), str(size), str(blocks), f"{variant.width:g}",
            f"{variant.depth:g}", f"{variant.dropout_rate:g}", f"{parameters:,}",
            f"{parameters + statistics:,}", f"{multiply_adds / 1e9:.3f}",
        ])  # fmt: skip
    head = [
        "model", "train px", "eval px", "blocks", "width", "depth", "dropout", "parameters",
        "with statistics", "multiply-adds (G)",
    ]  # fmt: skip
    return _table(head, body, left=1)


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(
        "Stages, shapes, parameters and multiply-adds of a network.",
        prog="python -m effv2_jax.models.summary",
    )
    parser.add_argument("name", nargs="?", help="a model, e.g. efficientnetv2-s")
    parser.add_argument("--image-size", type=int, help="pixels; default: the evaluation size")
    parser.add_argument("--all", action="store_true", help="compare all models")
    flags = parser.parse_args(arguments)
    if flags.all:
        print(format_all())
    elif flags.name is None:
        raise UserError("no model given: name one (e.g. efficientnetv2-s), or use --all")
    else:
        variant = get_variant(flags.name)
        size = variant.eval_size if flags.image_size is None else flags.image_size
        rows = summarize(variant, image_size=size)
        print(format_summary(flags.name, rows, image_size=size))


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
