"""Sizes, paddings and phases of a convolution: plain integers, known when a program is traced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
from jax import lax

Padding = str | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution.

    Attributes:
        size: length of the input.
        kernel: number of taps.
        stride: step between outputs.
        low: zeros before the input.
        high: zeros after it.
    """

    size: int
    kernel: int
    stride: int
    low: int
    high: int

    @property
    def out(self) -> int:
        """Length of the output."""
        return (self.size + self.low + self.high - self.kernel) // self.stride + 1

    def taps_of_phase(self, phase: int) -> list[tuple[int, int]]:
        """Taps that connect the inputs h = stride * q + phase with an output.

        Output o reads input stride * o + tap - low, so input h reaches output
        q + (phase + low - tap) / stride for the taps that make this whole.

        Returns:
            (tap, offset) pairs: input stride * q + phase meets output q + offset through tap.
        """
        reach = [(tap, phase + self.low - tap) for tap in range(self.kernel)]
        return [(tap, d // self.stride) for tap, d in reach if d % self.stride == 0]

    @property
    def phase_length(self) -> int:
        """Inputs per phase, rounded up: phases * phase_length >= size."""
        return -(-self.size // self.stride)

    @property
    def reach(self) -> tuple[int, int]:
        """Zeros (before, after) the outputs that let every phase read at its offsets."""
        offsets = [o for phase in range(self.stride) for _, o in self.taps_of_phase(phase)]
        return max(0, -min(offsets)), max(0, max(offsets) + self.phase_length - self.out)


@dataclass(frozen=True)
class Geometry:
    """Both spatial axes of a convolution."""

    rows: Axis
    columns: Axis

    @property
    def strides(self) -> tuple[int, int]:
        """Stride of each axis."""
        return self.rows.stride, self.columns.stride

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros around the input, ((top, bottom), (left, right))."""
        return (self.rows.low, self.rows.high), (self.columns.low, self.columns.high)

    @property
    def of_input_gradient(self) -> "Geometry":
        """Of the convolution of dy, with the taps reversed, that is the input's gradient; stride 1.

        Only where no padding reaches beyond the kernel.
        """
        axes = (
            Axis(a.out, a.kernel, 1, a.kernel - 1 - a.low, a.kernel - 1 - a.high)
            for a in (self.rows, self.columns)
        )
        return Geometry(*axes)

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel reads exactly the input pixel at its own place."""
        return all(
            (a.kernel, a.stride, a.low, a.high) == (1, 1, 0, 0) for a in (self.rows, self.columns)
        )

    @property
    def has_own_forms(self) -> bool:
        """Whether the CPU forms cover it: stride 1 or 2, no more padding than the kernel reaches.

        Networks need nothing else; what is outside takes XLA's convolution.
        """
        return all(
            a.stride in (1, 2) and max(a.low, a.high) < max(a.kernel, 2) and min(a.low, a.high) >= 0
            for a in (self.rows, self.columns)
        )


# How an operation is computed: (images, kernel, geometry) -> images.
Form = Callable[[jax.Array, jax.Array, Geometry], jax.Array]


def make_geometry(
    x_shape: Sequence[int], kernel_shape: Sequence[int], *, stride: int, padding: Padding
) -> Geometry:
    """Resolves a padding for x [N, H, W, C] and kernel [kh, kw, ...].

    Raises:
        ValueError: an unknown padding name, or an output without a pixel.
    """
    size, window = tuple(x_shape[1:3]), tuple(kernel_shape[:2])
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding {padding!r}, expected SAME, VALID or ((t, b), (l, r))")
        pairs = lax.padtype_to_pads(size, window, (stride, stride), padding)
    else:
        pairs = padding
    rows, columns = (
        Axis(size=s, kernel=k, stride=stride, low=int(low), high=int(high))
        for s, k, (low, high) in zip(size, window, pairs, strict=True)
    )
    if min(rows.out, columns.out) < 1:
        raise ValueError(f"image {size} is smaller than the kernel {window} with padding {pairs}")
    return Geometry(rows=rows, columns=columns)
