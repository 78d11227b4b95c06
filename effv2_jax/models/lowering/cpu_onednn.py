"""Products of bfloat16 by oneDNN, the library inside jaxlib's builds for x86-64.

XLA's CPU backend widens numbers of 16 bits before it convolves them, and copies one operand of a
product that sums over rows. oneDNN takes both as they are, and an eighth to two fifths of the time
of float32 where the processor has AMX or AVX-512 BF16 (`docs/cpu_forms.md`). XLA has operations for
it that it uses by itself only behind experimental flags; here they are called by their names.

Neither the names nor their configuration are promised to stay, and where oneDNN cannot do what it
is asked the process ends. So they are used where they were tested, see `is_available`. A program
with one of them cannot be written to JAX's compilation cache.
"""

import functools
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax

from effv2_jax import processor
from effv2_jax.models.lowering import plain
from effv2_jax.models.lowering.geometry import Geometry

_TESTED = ((0, 10), (0, 13))  # versions of jaxlib: from the first on, before the second
_INSTRUCTIONS = {"amx_bf16", "avx512_bf16"}
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # by which users keep oneDNN from some of them
# What its configuration calls the axes of images [N, H, W, C] and kernels [k, k, C, O].
_IMAGE = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
_KERNEL = {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": [0, 1]}


@functools.cache
def is_available() -> bool:
    """Returns whether CPUs compute these operations here, and were seen to compute them well."""
    return (
        sys.platform == "linux"
        and platform.machine() == "x86_64"
        and not any(name in os.environ for name in _LIMITS)
        and _TESTED[0] <= jaxlib.version.__version_info__[:2] < _TESTED[1]
        and not _INSTRUCTIONS.isdisjoint(processor.describe().get("flags", "").split())
    )


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    groups: int = 1,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Convolves; without a gradient of its own.

    Args:
        x: [N, H, W, C], bfloat16.
        kernel: [k, k, C / groups, O], bfloat16.
        geometry: of the convolution.
        groups: of channels, each with its own filters; 1 or C.
        dtype: of the result, float32 or bfloat16.

    Returns:
        [N, H', W', O], `dtype`; the sums are float32.
    """
    configuration = {
        "dims": 4,
        "feature_groups": groups,
        "input": _IMAGE,
        "kernel": {"filter": {**_KERNEL, "shape": kernel.shape}},
        "output": _IMAGE,
        "window": {
            "strides": geometry.strides,
            "pad_left": [low for low, _ in geometry.padding],
            "pad_right": [high for _, high in geometry.padding],
            "window_dilations": [1, 1],
        },
    }
    plainly = plain.depthwise if groups > 1 else plain.dense
    return _call(
        "convolution",
        {"onednn_conv_config": configuration},
        lambda x, kernel: plainly(x, kernel, geometry).astype(dtype),
        x,
        kernel,
    )


def outer_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum over the rows of x [rows, C] and y [rows, O], bfloat16, of their outer products.

    Returns:
        [C, O], float32, as are the sums; without a gradient of its own.
    """
    configuration = {"onednn_matmul_config": {"transpose_a": True}}
    return _call("matmul", configuration, lambda x, y: x.T @ y, x, y)


def _call(
    operation: str,
    configuration: dict[str, Any],
    plainly: Callable[..., jax.Array],
    *operands: jax.Array,
) -> jax.Array:
    """Calls an operation of oneDNN where a CPU computes, its plain twin in a program for others.

    Args:
        operation: behind XLA's prefix.
        configuration: XLA's BackendConfig (xla/service/cpu/backend_config.proto).
        plainly: the same of the same numbers in float32.
        operands: bfloat16.

    Returns:
        What `plainly` does.
    """

    def widened(*operands: jax.Array) -> jax.Array:
        return plainly(*(operand.astype(jnp.float32) for operand in operands))

    call = jax.ffi.ffi_call(
        f"__onednn${operation}",
        jax.eval_shape(widened, *operands),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(configuration),
    )
    return lax.platform_dependent(*operands, cpu=call, default=widened)
