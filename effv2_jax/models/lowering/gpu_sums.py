"""Sums of several functions of the same activations over the pixels of each image, in one pass.

XLA reads the operands once for each such sum, or writes what the functions share (a sigmoid) to
memory in float32: it fuses two reductions at most. On NVIDIA's GPUs this is a Pallas kernel:
a program reads its columns of a part of one image, a few rows of pixels at a time, and keeps all
sums in registers. Elsewhere, and as the definition, it is `plain_sums`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
# Blocks of the arrays [..., rows, C] and of the vectors [..., 1, C], float32 -> terms to sum.
Terms = Callable[[Sequence[Array], Sequence[Array]], tuple[Array, ...]]

# A program's columns are 128 bytes of bfloat16, a line of the cache; 1,024 elements of each array
# are 8 for each thread of four warps, and as many accumulators for each sum.
_COLUMNS = 64
_ROWS = 16
_WARPS = 4
# Pixels of a program: large images of few channels must make work for all of a GPU's processors.
_PIXELS = 512
# Compute capability that Triton needs, of Ampere.
_OLDEST = 8
# What Pallas cannot write for these GPUs: of the activations, the exact "gelu" has it.
_NOT_IN_KERNELS = ("erfc",)


def image_sums(
    terms: Terms, count: int, arrays: Sequence[Array], vectors: Sequence[Array]
) -> tuple[Array, ...]:
    """Sums terms over the pixels of each image.

    Args:
        terms: elementwise; see `Terms`.
        count: of terms.
        arrays: [N, H, W, C] each, any float type.
        vectors: [G, C] float32 each, for G groups of consecutive images.

    Returns:
        `count` sums [N, C], float32.
    """
    plain = functools.partial(plain_sums, terms, count)
    element = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    operations = str(jax.make_jaxpr(terms)([element] * len(arrays), [element] * len(vectors)))
    if any(name in operations for name in _NOT_IN_KERNELS) or not _compiles_kernels():
        return plain(arrays, vectors)
    kernel = functools.partial(kernel_sums, terms, count)
    return lax.platform_dependent(tuple(arrays), tuple(vectors), cuda=kernel, default=plain)


def _compiles_kernels() -> bool:
    """Whether the device, if it is one of NVIDIA's, is of the Ampere generation or later."""
    if jax.default_backend() != "gpu":
        return True  # lowered for a device that is not here
    major = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")[0]
    return not major.isdigit() or int(major) >= _OLDEST


def plain_sums(
    terms: Terms, count: int, arrays: Sequence[Array], vectors: Sequence[Array]
) -> tuple[Array, ...]:
    """What `image_sums` computes, in operations of XLA."""
    del count
    groups, channels = vectors[0].shape
    blocks = [x.astype(jnp.float32).reshape(groups, -1, *x.shape[1:]) for x in arrays]
    wide = [v[:, None, None, None] for v in vectors]
    return tuple(jnp.sum(v, (2, 3)).reshape(-1, channels) for v in terms(blocks, wide))


def kernel_sums(
    terms: Terms,
    count: int,
    arrays: Sequence[Array],
    vectors: Sequence[Array],
    *,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """What `image_sums` computes, as a kernel of Pallas; `interpret` runs it anywhere, slowly."""
    # Not at the top: who trains on CPUs need not wait for it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    images, height, width, channels = arrays[0].shape
    groups, pixels = vectors[0].shape[0], height * width
    per_group, parts = images // groups, pl.cdiv(pixels, _PIXELS)

    def kernel(*refs: Array) -> None:
        array_refs, vector_refs = refs[: len(arrays)], refs[len(arrays) : -count]
        first, column = pl.program_id(1) * _PIXELS, pl.program_id(2) * _COLUMNS
        columns = pl.ds(column, _COLUMNS)
        inside = column + jnp.arange(_COLUMNS) < channels

        def load(ref: Array, at: tuple, mask: Array) -> Array:
            return triton.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)

        own = [load(ref, (columns,), inside)[None] for ref in vector_refs]

        def add(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            row = first + block * _ROWS
            rows = pl.ds(row, _ROWS)
            within = (row + jnp.arange(_ROWS) < pixels)[:, None] & inside[None]
            values = terms([load(ref, (rows, columns), within) for ref in array_refs], own)
            return tuple(s + jnp.where(within, v, 0) for s, v in zip(sums, values, strict=True))

        zeros = (jnp.zeros((_ROWS, _COLUMNS), jnp.float32),) * count
        sums = lax.fori_loop(0, pl.cdiv(min(pixels, _PIXELS), _ROWS), add, zeros)
        for ref, value in zip(refs[-count:], sums, strict=True):
            triton.store(ref.at[columns], jnp.sum(value, 0), mask=inside)

    whole = pl.BlockSpec((None, pixels, channels), lambda image, *_: (image, 0, 0))
    of_group = pl.BlockSpec((None, channels), lambda image, *_: (image // per_group, 0))
    of_part = pl.BlockSpec((None, None, channels), lambda image, part, _: (image, part, 0))
    sums = pl.pallas_call(
        kernel,
        grid=(images, parts, pl.cdiv(channels, _COLUMNS)),
        in_specs=[whole] * len(arrays) + [of_group] * len(vectors),
        out_specs=[of_part] * count,
        out_shape=[jax.ShapeDtypeStruct((images, parts, channels), jnp.float32)] * count,
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="image_sums",
    )(*(x.reshape(images, pixels, channels) for x in arrays), *vectors)
    return tuple(jnp.sum(v, 1) for v in sums)
