"""One row of an architecture: its fields, its notation as a string, how width and depth scale it.

Official: effnetv2_configs.py (BlockDecoder) and effnetv2_model.py (round_filters, round_repeats) of
google/automl, efficientnetv2. Imports neither jax nor flax.
"""

import dataclasses
import decimal
import itertools
import math
import re
from collections.abc import Iterable, Sequence

from effv2_jax.errors import UserError

CHANNEL_DIVISOR = 8  # scaled channel counts are multiples of this (hparams.py: depth_divisor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One row of an architecture: `repeats` equal blocks, of which the first may stride.

    Attributes:
      fused: FusedMBConv (one dense convolution) instead of MBConv (1x1 and depthwise).
      kernel: side of the spatial convolution.
      stride: of the first block; the repeats have stride 1.
      expand: inner channels / input channels.
      in_channels: channels that enter the first block, before `width` scales them.
      channels: channels that leave every block, before `width` scales them.
      repeats: number of blocks, before `depth` scales it.
      se: squeeze-and-excite channels / block input channels; 0: none.
      two_convs: a FusedMBConv of expand 1 keeps the 1x1 projection behind its k x k convolution
        (as timm's first models do) instead of leaving it out (as the official ones).
    """

    fused: bool
    kernel: int
    stride: int
    expand: int
    in_channels: int
    channels: int
    repeats: int
    se: float
    two_convs: bool = False

    def __post_init__(self) -> None:
        for field in ("kernel", "stride", "expand", "in_channels", "channels", "repeats"):
            if getattr(self, field) < 1:
                raise UserError(f"block {self}: {field} is {getattr(self, field)}, must be >= 1")
        if not 0 <= self.se <= 1:
            raise UserError(f"block {self}: se is {self.se}, must be between 0 and 1")
        if self.two_convs and not (self.fused and self.expand == 1):
            raise UserError(f"block {self}: two_convs is for FusedMBConv (c1) with expand 1 (e1)")

    @property
    def expands(self) -> bool:
        """Whether the block begins with a convolution, and a norm, to the inner channels."""
        return self.expand > 1 or self.two_convs

    @property
    def has_residual(self) -> bool:
        """Whether input and output may be added: same resolution, same channels."""
        return self.stride == 1 and self.in_channels == self.channels

    @property
    def inner_channels(self) -> int:
        """Channels between expansion and projection."""
        return self.in_channels * self.expand

    @property
    def se_channels(self) -> int:
        """Squeezed channels; counted from the block's INPUT, not from the expanded channels."""
        return max(1, int(self.in_channels * self.se)) if self.se else 0


_BLOCK_KEYS = {
    "r": "repeats", "k": "kernel", "s": "stride", "e": "expand", "i": "in_channels",
    "o": "channels", "c": "fused", "se": "se", "p": "two_convs",
}  # fmt: skip


def parse_block(text: str) -> BlockSpec:
    """Reads the official notation of a row, such as "r2_k3_s2_e4_i16_o32_se0.25" (c1: fused).

    An addition to it: p1 stands for `two_convs`.

    Raises:
      UserError: not in this notation; names the part.
    """
    found = {}
    for part in text.split("_"):
        match = re.fullmatch(r"(se|[rkseiocp])(\d+(?:\.\d+)?)", part)
        if match is None or (match[1] != "se" and not match[2].isdigit()):
            raise UserError(
                f"block {text!r}: cannot read {part!r}; expected parts like r2 k3 s1 e4 i24 o48 "
                "(all needed), se0.25, c1, p1"
            )
        found[match[1]] = match[2]
    missing = [key for key in "rkseio" if key not in found]
    if missing:
        raise UserError(
            f"block {text!r}: no {', '.join(missing)}; expected like r2_k3_s1_e4_i24_o48"
        )
    for key, meaning in (
        ("c", "c0 is MBConv, c1 FusedMBConv"),
        ("p", "p1 keeps the projection of a FusedMBConv with e1"),
    ):
        if found.get(key, "0") not in ("0", "1"):
            raise UserError(f"block {text!r}: {key}{found[key]} is unknown; {meaning}")
    return BlockSpec(
        fused=found.get("c") == "1",
        se=float(found.get("se", 0)),
        two_convs=found.get("p") == "1",
        **{_BLOCK_KEYS[key]: int(found[key]) for key in "rkseio"},
    )


def format_block(spec: BlockSpec) -> str:
    """Writes a row in the official notation; the inverse of `parse_block`."""
    text = (
        f"r{spec.repeats}_k{spec.kernel}_s{spec.stride}_e{spec.expand}"
        f"_i{spec.in_channels}_o{spec.channels}_c{int(spec.fused)}"
    )
    if spec.two_convs:
        text += "_p1"
    # Every digit, and no exponent: the string reads back as it was.
    return f"{text}_se{decimal.Decimal(repr(spec.se)):f}" if spec.se else text


def parse_blocks(blocks: Iterable[str | BlockSpec]) -> tuple[BlockSpec, ...]:
    """Reads a list of rows, each a string of the official notation or a `BlockSpec`."""
    return tuple(parse_block(row) if isinstance(row, str) else row for row in blocks)


def round_channels(channels: int, width: float) -> int:
    """Scales a channel count to a multiple of 8, nearest, at least 8.

    Official: effnetv2_model.py, round_filters. There is no "not below 90 %" rule.
    """
    scaled = channels * width + CHANNEL_DIVISOR / 2
    return max(CHANNEL_DIVISOR, int(scaled) // CHANNEL_DIVISOR * CHANNEL_DIVISOR)


def round_repeats(repeats: int, depth: float) -> int:
    """Scales a number of blocks, rounding up. Official: effnetv2_model.py, round_repeats."""
    return math.ceil(depth * repeats)


def expand_blocks(
    blocks: Sequence[BlockSpec], *, width: float, depth: float
) -> tuple[BlockSpec, ...]:
    """Scales the rows and writes out the repeats: one `BlockSpec` with repeats=1 per block."""
    out = []
    for row in blocks:
        first = dataclasses.replace(
            row,
            in_channels=round_channels(row.in_channels, width),
            channels=round_channels(row.channels, width),
            repeats=1,
        )
        rest = dataclasses.replace(first, in_channels=first.channels, stride=1)
        out += [first] + [rest] * (round_repeats(row.repeats, depth) - 1)
    for before, after in itertools.pairwise(out):
        if before.channels != after.in_channels:
            raise UserError(
                f"blocks do not fit: {format_block(before)} gives {before.channels} channels, "
                f"{format_block(after)} expects {after.in_channels}"
            )
    if not out:
        raise UserError("blocks is empty: a network needs at least one block")
    return tuple(out)
