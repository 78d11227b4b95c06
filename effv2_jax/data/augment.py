"""Random changes to a batch of images on the device, inside the jitted training step.

Every image has its own typed key; what happens to it depends on that key alone, not on the
batch, the device or the number of hosts. Each function takes its own stream from the key, so one
key per image serves all of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from effv2_jax.data.augment_apply import Plan, apply_operations
from effv2_jax.data.augment_ops import square
from effv2_jax.data.policy import (
    AUTOAUGMENT_V0,
    IDENTITY,
    OPERATIONS,
    SIGNED,
    Policy,
    make_policy,
)
from effv2_jax.errors import UserError

__all__ = [
    "Policy",
    "augment",
    "finetune_cutout",
    "flip",
    "make_policy",
    "random_erasing",
]

# Streams of an image's key, one per purpose.
_FLIP, _POLICY, _CUTOUT, _ERASING = range(4)


def flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image left-right with probability 1/2.

    Args:
      images: [N, H, W, C], any dtype.
      keys: typed keys [N].

    Returns:
      [N, H, W, C].
    """
    mirrored = jax.vmap(jax.random.bernoulli)(_streams(keys, _FLIP))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def augment(
    images: jax.Array,
    keys: jax.Array,
    table: jax.Array,
    policy: Policy,
    implementation: str = "auto",
) -> jax.Array:
    """Applies a policy's random operations.

    Args:
      images: uint8 [N, H, W, 3].
      keys: typed keys [N].
      table: `policy.table(magnitude)`, float32 [rows, 2]; passed as a traced array, so that
        another magnitude needs no new program.
      policy: static.
      implementation: see `augment_apply`; "auto" goes by the platform that is compiled for.

    Returns:
      uint8 [N, H, W, 3]; the same bits from both implementations.

    Raises:
      UserError: for an unknown implementation or a table of another policy.
    """
    if np.shape(table) != (policy.table_rows, 2):
        raise UserError(
            f"augmentation table has shape {np.shape(table)}, policy {policy.name!r} expects "
            f"{(policy.table_rows, 2)}: pass policy.table(magnitude) of this policy"
        )
    if policy.max_layers == 0:
        return images
    draw = _drawer(policy, jnp.asarray(table, jnp.float32), images.shape[1:3])
    operations, arguments, centres = jax.vmap(draw)(_streams(keys, _POLICY))
    return apply_operations(
        images, operations, arguments=arguments, centres=centres, implementation=implementation
    )


def finetune_cutout(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Fills a square of half the image's side with noise: the official augmentation 'ft'.

    Args:
      images: float32 [N, H, W, C], normalised.
      keys: typed keys [N].

    Returns:
      float32 [N, H, W, C]. The square's centre is uniform over the image, its side 2 * (W // 4),
      cut at the border, its values U[0, 1) per pixel and channel. Official: preprocessing.py
      preprocess_for_finetune.
    """
    _, height, width, channels = images.shape
    pad = width // 4

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        noise_key, centre_key = jax.random.split(key)
        y, x = jax.random.randint(centre_key, (2,), 0, jnp.asarray([height, width]))
        noise = jax.random.uniform(noise_key, (2 * pad, 2 * pad, channels), image.dtype)
        row = jnp.clip(np.arange(height) - (y - pad), 0, 2 * pad - 1)
        column = jnp.clip(np.arange(width) - (x - pad), 0, 2 * pad - 1)
        noise = noise[row[:, None], column[None, :]]
        return jnp.where(square(height, width, pad=pad, y=y, x=x), noise, image)

    return _each(one, images, _streams(keys, _CUTOUT)) if pad else images


def random_erasing(
    images: jax.Array,
    keys: jax.Array,
    probability: jax.Array | float,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    attempts: int = 10,
) -> jax.Array:
    """Replaces a random box with normal noise (arXiv:1708.04896).

    Args:
      images: float32 [N, H, W, C], normalised.
      keys: typed keys [N].
      probability: that an image gets a box; may be traced.
      area: the box's share of the image, uniform.
      aspect: height / width of the box, uniform in its logarithm.
      attempts: boxes that are drawn until one is smaller than the image; none is: no erasing.

    Returns:
      float32 [N, H, W, C]. Distribution and defaults of timm's data/random_erasing.py
      (mode "pixel", one box): N(0, 1) per pixel and channel.
    """
    _, height, width, channels = images.shape
    # Rounding the sides adds at most half a pixel to each; a box fits the noise in any shape.
    most = int(area[1] * height * width + 0.5 * (height + width) + 1)

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        use_key, box_key, noise_key = jax.random.split(key, 3)
        (top, left, h, w), found = _erased_box(
            box_key, (height, width), area=area, aspect=aspect, attempts=attempts
        )

        def erase(image: jax.Array) -> jax.Array:
            noise = jax.random.normal(noise_key, (most, channels), image.dtype)
            row = np.arange(height)[:, None] - top
            column = np.arange(width)[None, :] - left
            inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
            noise = noise[jnp.where(inside, row * w + column, 0)]
            return jnp.where(inside[..., None], noise, image)

        use = jax.random.bernoulli(use_key, probability) & found
        return jax.lax.cond(use, erase, lambda image: image, image)

    return _each(one, images, _streams(keys, _ERASING))


def _erased_box(
    key: jax.Array,
    size: tuple[int, int],
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    attempts: int,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Draws a box: (top, left, height, width), int32, and whether any attempt fitted."""
    height, width = size
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    pixels = jax.random.uniform(area_key, (attempts,), minval=area[0], maxval=area[1])
    pixels = pixels * (height * width)
    low, high = np.log(aspect[0]), np.log(aspect[1])
    ratio = jnp.exp(jax.random.uniform(aspect_key, (attempts,), minval=low, maxval=high))
    heights = jnp.round(jnp.sqrt(pixels * ratio)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(pixels / ratio)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    h, w = heights[first], widths[first]
    room = jnp.maximum(jnp.stack([height - h, width - w]), 0) + 1
    top, left = jax.random.randint(place_key, (2,), 0, room)
    return (top, left, h, w), jnp.any(fits)


def _streams(keys: jax.Array, purpose: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def _each(function: Callable, images: jax.Array, keys: jax.Array) -> jax.Array:
    """Applies a function of one image; on a CPU in turn, so that `cond` skips work."""

    def in_turn(images: jax.Array, keys: jax.Array) -> jax.Array:
        return jax.lax.map(lambda inputs: function(*inputs), (images, keys))

    return jax.lax.platform_dependent(images, keys, cpu=in_turn, default=jax.vmap(function))


def _drawer(policy: Policy, table: jax.Array, size: tuple[int, int]) -> Callable[[jax.Array], Plan]:
    """Makes the function that draws what an image gets, from the image's key.

    Official: autoaugment.py distort_image. RandAugment always applies its operations: the
    official code draws a probability and does not use it.
    """
    layers = policy.max_layers
    names = (*OPERATIONS, "Identity")
    signed = np.asarray([name in SIGNED for name in names])
    rotates = np.asarray([name == "Rotate" for name in names])

    def randaugment(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = _below(len(OPERATIONS), bits[: policy.layers])
        return _fill(chosen, table[chosen], layers)

    def autoaugment(bits: jax.Array, chance_bits: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = np.asarray([[OPERATIONS.index(op[0]) for op in pair] for pair in AUTOAUGMENT_V0])
        chances = np.asarray([[op[1] for op in pair] for pair in AUTOAUGMENT_V0], np.float32)
        rows = table[-pairs.size :].reshape(*pairs.shape, 2)
        pair = _below(len(pairs), bits[0])
        uniform = (chance_bits[:2] >> 8).astype(jnp.float32) * np.float32(2**-24)
        applied = uniform + jnp.asarray(chances)[pair] >= 1
        chosen = jnp.where(applied, jnp.asarray(pairs)[pair], IDENTITY)
        return _fill(chosen, rows[pair], layers)

    def draw(key: jax.Array) -> Plan:
        # All numbers at once: a call for each would double the time that XLA takes to compile.
        which, operation, chance, sign, y, x = jax.random.bits(key, (6, layers))
        if policy.name == "ra_aa":
            chosen, arguments = jax.tree.map(
                lambda a, b: jnp.where(_below(2, which[0]) == 0, a, b),
                autoaugment(operation, chance),
                randaugment(operation),
            )
        elif policy.uses_randaugment:
            chosen, arguments = randaugment(operation)
        else:
            chosen, arguments = autoaugment(operation, chance)
        negative = (_below(2, sign) == 1) & jnp.asarray(signed)[chosen]
        # To turn the other way is to negate the sine, Rotate's second argument.
        turned = jnp.asarray(rotates)[chosen]
        negated = negative[:, None] & jnp.stack([~turned, turned], axis=-1)
        centres = jnp.stack([_below(size[0], y), _below(size[1], x)], axis=-1)
        return chosen, jnp.where(negated, -arguments, arguments), centres

    return draw


def _below(limit: int, bits: jax.Array) -> jax.Array:
    """Integers 0..limit-1 from random uint32; uneven by limit / 2**32 at most."""
    return (bits % np.uint32(limit)).astype(jnp.int32)


def _fill(chosen: jax.Array, arguments: jax.Array, layers: int) -> tuple[jax.Array, jax.Array]:
    """Appends identities up to `layers` operations."""
    extra = layers - chosen.shape[0]
    return (
        jnp.pad(chosen, (0, extra), constant_values=IDENTITY),
        jnp.pad(arguments, ((0, extra), (0, 0))),
    )
