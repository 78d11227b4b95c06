"""Parts of a batch that are computed one after the other, so that their maps stay in the caches.

A second-level cache holds one or two megabytes, the maps of a batch ten or more.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.models.lowering.geometry import Geometry


class Bands:
    """Some rows of the outputs of an image, or some images, with the inputs that they see.

    Attributes:
        count: of bands.
        images: in a band.
        rows: of outputs in a band.
        columns: of outputs in a band, at least those that there are.
    """

    def __init__(
        self,
        examples: int,
        geometry: Geometry,
        *,
        pixels: int,
        unit: int = 1,
        overlap: bool = False,
    ) -> None:
        """Divides a batch.

        Args:
            examples: in the batch.
            geometry: of the convolution.
            pixels: of outputs that a band should have, about.
            unit: rows and columns of a band are a multiple of it; the last may be outside.
            overlap: rather than being outside, the last band of an image has rows of the one
                before: for `write`. Without, every row is in one band: for sums.
        """
        height, width = (-(-axis.out // unit) for axis in (geometry.rows, geometry.columns))
        whole = height * width * unit**2
        most = -(-height // max(1, whole // pixels))
        # Up to half as many, if then fewer are outside.
        fewest = -(-most // 2)
        rows = min(range(most, fewest - 1, -1), key=lambda rows: -(-height // rows) * rows)
        self._per_image = -(-height // rows)
        self._geometry = geometry
        self.rows, self.columns = rows * unit, width * unit
        wanted = max(1, -(-pixels // whole))
        self.images = max(n for n in range(1, wanted + 1) if examples % n == 0)
        self.count = examples // self.images * self._per_image
        all_rows = self.rows * self._per_image
        self._height = max(geometry.rows.out, self.rows) if overlap else all_rows

    def pad_input(self, x: jax.Array) -> jax.Array:
        """Adds to x [N, H, W, C] all that bands see of its outside."""
        axes = self._geometry.rows, self._geometry.columns
        lengths = (
            (out - 1) * axis.stride + axis.kernel
            for out, axis in zip((self._height, self.columns), axes, strict=True)
        )
        return _fill(x, (axes[0].low, axes[1].low), lengths)

    def pad_output(self, dy: jax.Array) -> jax.Array:
        """Adds to dy [N, H', W', O] the zeros that the last bands see."""
        return _fill(dy, (0, 0), (self._height, self.columns))

    def input(self, padded: jax.Array, i: jax.Array) -> jax.Array:
        """Inputs of band i, from `pad_input`: [images, (rows - 1) * stride + kernel, ..., C]."""
        axis = self._geometry.rows
        length = (self.rows - 1) * axis.stride + axis.kernel
        shape = (self.images, length, *padded.shape[2:])
        return lax.dynamic_slice(padded, self._start(i, axis.stride), shape)

    def output(self, padded: jax.Array, i: jax.Array) -> jax.Array:
        """Outputs' gradients of band i, from `pad_output`: [images, rows, columns, O]."""
        shape = (self.images, self.rows, *padded.shape[2:])
        return lax.dynamic_slice(padded, self._start(i), shape)

    def write(self, y: jax.Array, outputs: jax.Array, i: jax.Array) -> jax.Array:
        """Writes [images, rows, columns, O] into y [N, H', W', O]."""
        return lax.dynamic_update_slice(y, outputs[:, : y.shape[1], : y.shape[2]], self._start(i))

    def _start(self, i: jax.Array, stride: int = 1) -> tuple[jax.Array | int, ...]:
        row = jnp.minimum(i % self._per_image * self.rows, self._height - self.rows)
        return i // self._per_image * self.images, row * stride, 0, 0


def _fill(x: jax.Array, before: tuple[int, int], lengths: Iterable[int]) -> jax.Array:
    """X [N, H, W, C] in zeros: so many above and left of it, rows and columns in all."""
    after = (n - size - low for n, size, low in zip(lengths, x.shape[1:3], before, strict=True))
    widths = [(0, 0, 0), *((b, a, 0) for b, a in zip(before, after, strict=True)), (0, 0, 0)]
    # XLA computes x in the pass that writes this; without the barrier also for whatever reads the
    # middle alone.
    return lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), widths))
