"""How convolutions and norms are computed on each backend.

`models/layers.py` says what a layer means; this package says how it is computed. It is the only
place of the networks that asks which backend runs. `TABLE` holds every choice: GPUs and TPUs take
XLA's convolution as it is; XLA's CPU backend is several times slower with some of them, above all
with the gradients of depthwise convolutions, so it gets forms of its own (`cpu_depthwise.py`,
`cpu_dense.py`, `cpu_winograd.py`, `cpu_activation.py`; for bfloat16 `cpu_narrow.py`). On GPUs the
passes over memory between the convolutions decide, so norms are written out there (`gpu_norm.py`,
`gpu_sums.py`, `gpu_dense.py`). What waits for what, backends have to be told in different ways
(`ordering.py`).
All forms agree with the plain ones in value and gradient to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from effv2_jax.models.lowering import (
    cpu_activation,
    cpu_narrow,
    gpu_dense,
    gpu_norm,
    ordering,
    plain,
    windows,
)
from effv2_jax.models.lowering.geometry import Form, Padding, make_geometry
from effv2_jax.models.lowering.gpu_norm import Norm

__all__ = ["IMPLEMENTATIONS", "TABLE", "Lowering", "Norm", "choose", "conv2d", "depthwise_conv2d"]

IMPLEMENTATIONS = ("auto", "plain", "cpu", "gpu")

_Function = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Lowering:
    """The form of each operation on one backend.

    Attributes:
        dense: convolution with kernels of more than 1x1 that see every input channel.
        pointwise: 1x1 kernels, stride 1, no padding.
        depthwise: one filter per channel.
        norm: batch normalisation in training with what follows it up to the next convolution, as
            `gpu_norm.norm`, differentiable once; None: as `norm.BatchNorm` defines it,
            differentiated by JAX.
        activation: wraps the activation functions behind norms; same values to rounding.
        stored: applied to the input of a block with a shortcut, which several operations read.
        cast: (x, dtype) -> x as that type.
        map_type: the type of maps between convolutions that multiply numbers of the given type.
        result_type: the type of what these convolutions give, to a norm or a bias, in inference.
            In training it is that of maps.
        after: (x, y) -> x, from which nothing is computed before y is there (`models/remat.py`).
        pixels_at_once: of the inputs of a layer, which multiplies numbers of the given type, that
            are computed together in inference; None: of all images.
        joined_bytes: arrays of at most so many bytes are summed over the devices as one, see
            `all_reduce.psum`.
        channel_parallel_pixels: a block of so many pixels (of all images) for each inner channel,
            or less, is divided over the devices by channels instead of images, see
            `EfficientNet.channel_parallel`; 0: none is.
    """

    dense: Form
    pointwise: Form
    depthwise: Form
    norm: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None = None
    activation: Callable[[_Function], _Function] = lambda function: function
    stored: _Function = lambda x: x
    cast: Callable[[jax.Array, jnp.dtype], jax.Array] = lambda x, dtype: x.astype(dtype)
    map_type: Callable[[jnp.dtype], jnp.dtype] = lambda dtype: dtype
    result_type: Callable[[jnp.dtype], jnp.dtype] = lambda dtype: dtype
    after: Callable[[jax.Array, jax.Array], jax.Array] = ordering.arithmetic
    pixels_at_once: Callable[[jnp.dtype], int | None] = lambda dtype: None
    joined_bytes: int = 0
    channel_parallel_pixels: float = 0

    def images_at_once(self, count: int, pixels: int, dtype: jnp.dtype) -> int:
        """Returns how many of the images of a batch pass a layer together in inference.

        Args:
            count: of images.
            pixels: of the layer's input, of one image.
            dtype: of the numbers it multiplies.

        Returns:
            As many as `pixels_at_once` allows and `count` is a multiple of, or one; `count` if
            those were no more than half of what is allowed.
        """
        allowed = self.pixels_at_once(dtype)
        if allowed is None:
            return count
        most = max(1, allowed // pixels)
        if count <= most:
            return count
        few = max(n for n in range(1, most + 1) if count % n == 0)
        return few if 2 * few > most else count


_PLAIN = Lowering(dense=plain.dense, pointwise=plain.dense, depthwise=plain.depthwise)
_CPU = Lowering(
    dense=cpu_narrow.dense,
    pointwise=cpu_narrow.pointwise,
    depthwise=cpu_narrow.depthwise,
    activation=cpu_activation.stored,
    cast=windows.rounded,
    map_type=cpu_narrow.map_type,
    result_type=cpu_narrow.result_type,
    # The maps of a few images stay in the caches from one layer to the next, those of a batch do
    # not. Matrix products want some hundred rows; oneDNN orders its kernels anew for each part,
    # so there the limit is one of memory (docs/cpu_forms.md).
    pixels_at_once=lambda dtype: 2**20 if cpu_narrow.is_narrow(dtype) else 2**10,
    # V2-B0's 481 waits of a step become 179; to join larger arrays costs what is left to gain.
    joined_bytes=2**16,
    # Up to here more is saved with the kernels' gradients and updates than whole maps cost.
    channel_parallel_pixels=2,
)
_TPU = replace(_PLAIN, after=ordering.barrier)
_GPU = replace(_TPU, dense=gpu_dense.dense, norm=gpu_norm.norm, stored=gpu_norm.stored)

# Backend -> forms. A backend that is not listed takes the plain ones.
TABLE = {"cpu": _CPU, "gpu": _GPU, "tpu": _TPU}


def choose(implementation: str = "auto") -> Lowering:
    """Returns the forms that `implementation` stands for in this process.

    Args:
        implementation: "auto" takes the default backend's row of `TABLE`, "plain" XLA's own
            convolutions and gradients, "cpu" or "gpu" that row, on whatever backend.

    Raises:
        ValueError: for another name.
    """
    if implementation == "auto":
        return TABLE.get(jax.default_backend(), _PLAIN)
    if implementation == "plain":
        return _PLAIN
    if implementation in IMPLEMENTATIONS:
        return TABLE[implementation]
    raise ValueError(f"implementation {implementation!r}, expected one of {IMPLEMENTATIONS}")


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    implementation: str = "auto",
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Convolves images with filters that see every channel.

    Args:
        x: [N, H, W, C], any float type; cast to `dtype`, the type that is computed in.
        kernel: [k, k, C, O], any float type; cast to `dtype`, or `x` to a narrower one of the
            kernel where the form multiplies narrow numbers faster. Sums are not narrow.
        stride: the same along both axes.
        padding: "SAME" as in TensorFlow (at stride 2 the odd row or column is at the bottom or
            right), "VALID", or explicit ((top, bottom), (left, right)).
        implementation: see `choose`.
        dtype: float32, bfloat16 or float16; None: that of `x`.

    Returns:
        [N, H', W', O], `dtype`. The forms of CPUs and GPUs have their own gradient: reverse
        mode works any number of times, forward mode (`jax.jvp`) only with "plain".

    Raises:
        ValueError: shapes that do not fit, an unknown padding or implementation.
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(f"conv2d: x {x.shape}, kernel {kernel.shape}; expected NHWC and HWIO")
    geometry = make_geometry(x.shape, kernel.shape, stride=stride, padding=padding)
    forms = choose(implementation)
    x = x if dtype is None else forms.cast(x, dtype)
    if geometry.is_pointwise:
        return forms.pointwise(x, kernel, geometry)
    return forms.dense(x, kernel, geometry)


def depthwise_conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    implementation: str = "auto",
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Convolves every channel with its own filter.

    Args:
        x: [N, H, W, C], any float type; cast to `dtype`, the type that is computed in.
        kernel: [k, k, 1, C], any float type; as in `conv2d`.
        stride: the same along both axes.
        padding: as in `conv2d`.
        implementation: see `choose`.
        dtype: as in `conv2d`.

    Returns:
        [N, H', W', C], `dtype`; gradients as in `conv2d`.

    Raises:
        ValueError: shapes that do not fit, an unknown padding or implementation.
    """
    if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[3]):
        raise ValueError(
            f"depthwise_conv2d: x {x.shape}, kernel {kernel.shape}; expected NHWC and [k, k, 1, C]"
        )
    geometry = make_geometry(x.shape, kernel.shape, stride=stride, padding=padding)
    forms = choose(implementation)
    x = x if dtype is None else forms.cast(x, dtype)
    return forms.depthwise(x, kernel, geometry)
