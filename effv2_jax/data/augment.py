"""Random changes to a batch of images on the device, inside the jitted training step.

Every image has its own typed key; what happens to it depends on that key alone, not on the
batch, the device or the number of hosts. Each function derives its own stream from the key, so
one key per image serves all of them.

The choice of an operation per image is the expensive part: `vmap` of `lax.switch` runs all 16.
Hence two implementations with equal results: "map" goes over the images and takes the true branch
(for CPUs), "batch" applies each of the five kinds of operation to all images once and selects
(for GPUs and TPUs).
"""

import jax
import jax.numpy as jnp
import numpy as np

from effv2_jax.data import augment_ops as ops
from effv2_jax.data.policy import AUTOAUGMENT_V0, Policy, is_signed, make_policy
from effv2_jax.errors import UserError

__all__ = [
    "Policy",
    "augment",
    "finetune_cutout",
    "flip",
    "make_policy",
    "random_erasing",
]

IMPLEMENTATIONS = ("auto", "map", "batch")

# Streams of an image's key, one per purpose.
_FLIP, _POLICY, _CUTOUT, _ERASING = range(4)


def _streams(keys: jax.Array, purpose: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


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
      table: `policy.table(magnitude)`; passed as a traced array, another magnitude needs no new
        program.
      policy: static.
      implementation: "map", "batch" (see above), or "auto": by the platform that is compiled for.

    Returns:
      uint8 [N, H, W, 3]; the same bits from both implementations.

    Raises:
      UserError: for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"augment implementation is {implementation!r}, expected one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if policy.max_layers == 0:
        return images
    plan = _plan(keys, table, policy, images.shape[1:3])
    if implementation == "map":
        return _map(images, plan)
    if implementation == "batch":
        return _batch(images, plan)
    return jax.lax.platform_dependent(images, plan, cpu=_map, default=_batch)


# A plan is what each image gets: (operation int32 [N, L], arguments float32 [N, L, 2],
# centre of Cutout int32 [N, L, 2]).
_Plan = tuple[jax.Array, jax.Array, jax.Array]


def _plan(keys: jax.Array, table: jax.Array, policy: Policy, size: tuple[int, int]) -> _Plan:
    """Draws the operations of every image with signs, probabilities and centres."""
    table = jnp.asarray(table, jnp.float32)
    layers = policy.max_layers
    signed = np.asarray([is_signed(name) for name in ops.OPERATIONS] + [False])
    rotates = np.asarray([name == "Rotate" for name in ops.OPERATIONS] + [False])
    pairs = np.asarray([[ops.OPERATIONS.index(op[0]) for op in pair] for pair in AUTOAUGMENT_V0])
    chances = np.asarray([[op[1] for op in pair] for pair in AUTOAUGMENT_V0], np.float32)

    def randaugment(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = jax.random.randint(key, (policy.layers,), 0, len(ops.OPERATIONS))
        chosen = jnp.pad(chosen, (0, layers - policy.layers), constant_values=ops.IDENTITY)
        return chosen, table[jnp.minimum(chosen, ops.IDENTITY - 1)]

    def autoaugment(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        pair_key, chance_key = jax.random.split(key)
        pair = jax.random.randint(pair_key, (), 0, len(AUTOAUGMENT_V0))
        applied = jnp.floor(jax.random.uniform(chance_key, (2,)) + jnp.asarray(chances)[pair]) >= 1
        chosen = jnp.where(applied, jnp.asarray(pairs)[pair], ops.IDENTITY)
        rows = table[-2 * len(AUTOAUGMENT_V0) :].reshape(len(AUTOAUGMENT_V0), 2, 2)[pair]
        extra = layers - 2
        return (
            jnp.pad(chosen, (0, extra), constant_values=ops.IDENTITY),
            jnp.pad(rows, ((0, extra), (0, 0))),
        )

    def one(key: jax.Array) -> _Plan:
        which_key, op_key, sign_key, centre_key = jax.random.split(key, 4)
        if policy.name == "ra_aa":
            use_autoaugment = jax.random.bernoulli(which_key)
            chosen, arguments = jax.tree.map(
                lambda a, b: jnp.where(use_autoaugment, a, b),
                autoaugment(op_key),
                randaugment(op_key),
            )
        else:
            chosen, arguments = (
                randaugment(op_key) if policy.uses_randaugment else autoaugment(op_key)
            )
        negative = jax.random.bernoulli(sign_key, shape=(layers,)) & jnp.asarray(signed)[chosen]
        # Turning the other way round negates the sine, Rotate's second argument.
        negated = negative[:, None] & jnp.stack(
            [~jnp.asarray(rotates)[chosen], jnp.asarray(rotates)[chosen]], axis=-1
        )
        centre = jax.random.randint(centre_key, (layers, 2), 0, jnp.asarray(size, jnp.int32))
        return chosen, jnp.where(negated, -arguments, arguments), centre

    return jax.vmap(one)(_streams(keys, _POLICY))


def _map(images: jax.Array, plan: _Plan) -> jax.Array:
    """One image after the other, only the chosen operation runs."""
    branches = [
        lambda image, arguments, centre, name=name: ops.apply_operation(
            name, image, arguments=arguments, centre=centre
        )
        for name in ops.OPERATIONS
    ]
    branches.append(lambda image, arguments, centre: image)

    def one(inputs: tuple[jax.Array, _Plan]) -> jax.Array:
        def layer(image: jax.Array, step: _Plan) -> tuple[jax.Array, None]:
            chosen, arguments, centre = step
            return jax.lax.switch(chosen, branches, image, arguments, centre), None

        image, steps = inputs
        return jax.lax.scan(layer, image, steps)[0]

    return jax.lax.map(one, (images, plan))


def _batch(images: jax.Array, plan: _Plan) -> jax.Array:
    """All images at once, each kind of operation runs once per layer."""

    def one(
        image: jax.Array, chosen: jax.Array, arguments: jax.Array, centre: jax.Array
    ) -> jax.Array:
        def is_op(name: str) -> jax.Array:
            return chosen == ops.OPERATIONS.index(name)

        table = ops.identity_table()
        for name in ops.TABLE_OPERATIONS:
            table = jnp.where(is_op(name), ops.table_for(name, image, arguments[0]), table)
        matrix = jnp.asarray([1, 0, 0, 0, 1, 0], jnp.float32)
        for name in ops.AFFINE_OPERATIONS:
            matrix = jnp.where(is_op(name), ops.matrix_for(name, image, arguments), matrix)
        affine = chosen == jnp.asarray([ops.OPERATIONS.index(n) for n in ops.AFFINE_OPERATIONS])
        result = ops.apply_table(image, table)
        result = jnp.where(jnp.any(affine), ops.apply_affine(image, matrix), result)
        for name in ("Color", "Sharpness", "Cutout"):
            changed = ops.apply_operation(name, image, arguments=arguments, centre=centre)
            result = jnp.where(is_op(name), changed, result)
        return result

    def layer(batch: jax.Array, step: _Plan) -> tuple[jax.Array, None]:
        return jax.vmap(one)(batch, *step), None

    return jax.lax.scan(layer, images, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), plan))[0]


def finetune_cutout(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Fills a square of half the image's side with noise, as the official 'ft' augmentation.

    Args:
      images: float32 [N, H, W, C], normalised.
      keys: typed keys [N].

    Returns:
      float32 [N, H, W, C]; the square's centre is anywhere in the image, its side 2 * (W // 4),
      its values U[0, 1) per pixel and channel. Official: preprocessing.py
      preprocess_for_finetune.
    """
    _, height, width, channels = images.shape

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        noise_key, centre_key = jax.random.split(key)
        noise = jax.random.uniform(noise_key, (height, width, channels), image.dtype)
        y, x = jax.random.randint(centre_key, (2,), 0, jnp.asarray([height, width]))
        return jnp.where(ops.square(height, width, width // 4, y, x), noise, image)

    return jax.vmap(one)(images, _streams(keys, _CUTOUT))


def random_erasing(
    images: jax.Array,
    keys: jax.Array,
    probability: float,
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
      attempts: boxes that are drawn until one is smaller than the image; none: no erasing.

    Returns:
      float32 [N, H, W, C]. Distribution and defaults as timm's data/random_erasing.py with
      mode "pixel" and one box.
    """
    _, height, width, channels = images.shape

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        use_key, area_key, aspect_key, place_key, noise_key = jax.random.split(key, 5)
        pixels = (
            height
            * width
            * jax.random.uniform(area_key, (attempts,), minval=area[0], maxval=area[1])
        )
        ratio = jnp.exp(
            jax.random.uniform(
                aspect_key, (attempts,), minval=np.log(aspect[0]), maxval=np.log(aspect[1])
            )
        )
        heights = jnp.round(jnp.sqrt(pixels * ratio)).astype(jnp.int32)
        widths = jnp.round(jnp.sqrt(pixels / ratio)).astype(jnp.int32)
        fits = (heights < height) & (widths < width)
        first = jnp.argmax(fits)
        h, w = heights[first], widths[first]
        room = jnp.maximum(jnp.stack([height - h, width - w]), 0) + 1
        top, left = jax.random.randint(place_key, (2,), 0, room)
        row = np.arange(height)[:, None, None]
        column = np.arange(width)[None, :, None]
        box = (row >= top) & (row < top + h) & (column >= left) & (column < left + w)
        use = jax.random.bernoulli(use_key, probability) & jnp.any(fits)
        noise = jax.random.normal(noise_key, (height, width, channels), image.dtype)
        return jnp.where(use & box, noise, image)

    return jax.vmap(one)(images, _streams(keys, _ERASING))
