"""Mixup and CutMix on the device, over the global batch, as the official code does them.

Official: efficientnetv2/datasets.py (google/automl): mixup, cutmix_mask, cutmix, mixing.
Mixup: arXiv:1710.09412. CutMix: arXiv:1905.04899. An example's partner is found by reversing the
batch; with both, the first half gets mixup and the second CutMix, each reversed within itself.

Inside `jax.shard_map` the batch that is reversed is the global one (the official code, which mixes
in the input pipeline, reverses each host's): partners are exchanged
between devices, and an example's random numbers belong to its position in the global batch, so the
result does not depend on the number of devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effv2_jax.errors import UserError

# Streams of an example's key.
_BETA, _PLACE = range(2)

Batch = tuple[jax.Array, jax.Array]  # images [n, H, W, C] and labels [n, K]


def mixup_with(images: jax.Array, labels: jax.Array, weight: jax.Array) -> Batch:
    """Blends every example with its partner in the reversed batch.

    Args:
      images: float [n, H, W, C].
      labels: float [n, K].
      weight: float32 [n], samples of Beta(alpha, alpha); an example keeps the larger share,
        max(weight, 1 - weight).

    Returns:
      Mixed images and labels.
    """
    return _mixup((images, labels), (images[::-1], labels[::-1]), weight)


def cutmix_with(images: jax.Array, labels: jax.Array, mask: jax.Array) -> Batch:
    """Pastes a box of its partner into every example.

    Args:
      images: float [n, H, W, C].
      labels: float [n, K].
      mask: float32 [n, H, W, 1], 1 where the partner shows.

    Returns:
      Mixed images and labels. All labels are mixed by the MEAN area of the batch's boxes.
    """
    partner = (images[::-1], labels[::-1])
    return _cutmix((images, labels), partner, mask, jnp.sum(mask) / mask.size)


def mix(
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    mixup_alpha: jax.Array | float,
    cutmix_alpha: jax.Array | float,
    use_mixup: bool,
    use_cutmix: bool,
    axis_name: str | None = None,
) -> Batch:
    """Mixes the examples of a batch.

    Args:
      images: float32 [n, H, W, C], normalised; n is the local batch.
      labels: float32 [n, K].
      key: typed key, the same on every device.
      mixup_alpha: of Beta(alpha, alpha); may be traced; 0: no mixup.
      cutmix_alpha: the same for CutMix.
      use_mixup: static; False leaves mixup out of the program, whatever its alpha.
      use_cutmix: the same for CutMix.
      axis_name: of the mesh axis over which the batch is split, inside `jax.shard_map`.

    Returns:
      Mixed images and labels. With two positive alphas the first half of the global batch gets
      mixup and the second half CutMix; with one, that one is applied to the whole batch.

    Raises:
      UserError: if both are used and the local batch is odd.
    """
    local = images.shape[0]
    if use_mixup and use_cutmix and local % 2:
        raise UserError(
            f"mixup together with CutMix halves the batch, but a device has {local} examples; "
            "expected an even number: change train.batch_size"
        )
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local
    position = first + jnp.arange(local)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(position)
    samples = _beta_samples(keys, jnp.stack([mixup_alpha, cutmix_alpha]).astype(jnp.float32))

    def partners(batch: Batch, parts: int) -> Batch:
        return _exchange(batch, parts=parts, devices=devices, axis_name=axis_name)

    def cut(batch: Batch, partner: Batch, chosen: jax.Array) -> Batch:
        mask, area = _boxes(keys, samples[1], *images.shape[1:3])
        mean = _mean_area(area, chosen, mask[0].size, axis_name)
        return _cutmix(batch, partner, mask, mean)

    def no_mixing(batch: Batch) -> Batch:
        return batch

    def only_mixup(batch: Batch) -> Batch:
        return _mixup(batch, partners(batch, 1), samples[0])

    def only_cutmix(batch: Batch) -> Batch:
        return cut(batch, partners(batch, 1), jnp.ones((local,), bool))

    def both(batch: Batch) -> Batch:
        partner = partners(batch, 2)
        second = position >= devices * local // 2
        mixed = _mixup(batch, partner, samples[0])
        pasted = cut(batch, partner, second)
        return jax.tree.map(lambda a, b: jnp.where(_column(second, a), b, a), mixed, pasted)

    branches: list[Callable[[Batch], Batch]] = [no_mixing]
    index = jnp.zeros((), jnp.int32)
    if use_mixup:
        branches.append(only_mixup)
        index += jnp.asarray(mixup_alpha) > 0
    if use_cutmix:
        index += len(branches) * (jnp.asarray(cutmix_alpha) > 0)
        branches.append(only_cutmix)
    if use_mixup and use_cutmix:
        branches.append(both)
    # The alphas are the same on all devices, so all take the same branch and its exchanges match.
    return jax.lax.switch(index, branches, (images, labels))


def cutmix_box(
    x: jax.Array, y: jax.Array, *, area: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns a box's (top, bottom, left, right), int32, ends exclusive.

    Args:
      x: int32, column of its centre.
      y: int32, row of its centre.
      area: float32, the share of the image that stays, a sample of Beta(alpha, alpha).
      height: of the image.
      width: of the image.

    Returns:
      The box, 2 * (side // 2) long and cut at the border. Official: datasets.py cutmix_mask.
    """
    ratio = jnp.sqrt(1.0 - area)
    half_width = (ratio * width).astype(jnp.int32) // 2
    half_height = (ratio * height).astype(jnp.int32) // 2
    return (
        jnp.clip(y - half_height, 0, height),
        jnp.clip(y + half_height, 0, height),
        jnp.clip(x - half_width, 0, width),
        jnp.clip(x + half_width, 0, width),
    )


def _boxes(
    keys: jax.Array, samples: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Draws a box per example: masks float32 [n, H, W, 1] and their pixels int32 [n]."""

    def one(key: jax.Array, sample: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, y = jax.random.randint(
            jax.random.fold_in(key, _PLACE), (2,), 0, jnp.asarray([width, height])
        )
        top, bottom, left, right = cutmix_box(x, y, area=sample, height=height, width=width)
        rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
        mask = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        return mask.astype(jnp.float32), (bottom - top) * (right - left)

    return jax.vmap(one)(keys, samples)


def _beta_samples(keys: jax.Array, alphas: jax.Array) -> jax.Array:
    """Samples of Beta(alpha, alpha) for each of k alphas and n keys, float32 [k, n].

    From two samples of the gamma distribution each, all drawn by one loop: jax.random.beta would
    compile four. An alpha of 0, whose samples nobody uses, is replaced by 1.
    """

    def one(key: jax.Array) -> jax.Array:
        positive = jnp.where(alphas > 0, alphas, 1.0)
        return jax.random.loggamma(jax.random.fold_in(key, _BETA), positive, (2, *alphas.shape))

    first, second = jnp.moveaxis(jax.vmap(one)(keys), 0, -1)
    return jax.nn.sigmoid(first - second)


def _mean_area(
    area: jax.Array, counted: jax.Array, pixels: int, axis_name: str | None
) -> jax.Array:
    """The mean share of the image that a box covers, over the counted examples of all devices.

    Sums integers, so that the order, and with it the number of devices, does not matter; in two
    parts, because the pixels of a large batch overflow int32.
    """
    area = jnp.where(counted, area, 0)
    sums = jnp.stack([jnp.sum(area >> 10), jnp.sum(area & 1023), jnp.sum(counted)])
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    high, low, count = sums.astype(jnp.float32)
    return (high * 1024.0 + low) / (count * pixels)


def _column(values: jax.Array, like: jax.Array) -> jax.Array:
    """Values [n] shaped to broadcast against `like` [n, ...], in its dtype unless bool."""
    shaped = values.reshape((-1,) + (1,) * (like.ndim - 1))
    return shaped if values.dtype == bool else shaped.astype(like.dtype)


def _mixup(batch: Batch, partner: Batch, sample: jax.Array) -> Batch:
    weight = jnp.maximum(sample, 1.0 - sample)
    return jax.tree.map(
        lambda x, other: x * _column(weight, x) + other * (1.0 - _column(weight, x)),
        batch,
        partner,
    )


def _cutmix(batch: Batch, partner: Batch, mask: jax.Array, area: jax.Array) -> Batch:
    (images, labels), (other_images, other_labels) = batch, partner
    area = area.astype(labels.dtype)
    return (
        jnp.where(mask > 0, other_images, images),
        (1.0 - area) * labels + area * other_labels,
    )


def _exchange(batch: Batch, *, parts: int, devices: int, axis_name: str | None) -> Batch:
    """The partners of a batch of which each of `parts` equal parts is reversed, globally.

    Cut the global batch into parts * D blocks; device d holds the blocks d * parts + slot, and
    part p consists of the blocks p * D .. p * D + D - 1. The partners of a block are another block
    of its part, reversed. The blocks of one slot all come from one slot of different devices (for
    two parts: from the other slot if D is even, else from the same), so that one permutation of
    devices per slot suffices.
    """
    size = batch[0].shape[0] // parts
    received = []
    for slot in range(parts):
        links, from_slot = [], slot
        for device in range(devices):
            part, offset = divmod(device * parts + slot, devices)
            from_device, from_slot = divmod(part * devices + devices - 1 - offset, parts)
            links.append((from_device, device))
        rows = slice(from_slot * size, (from_slot + 1) * size)
        block = jax.tree.map(lambda x, rows=rows: x[rows][::-1], batch)
        if axis_name is not None:
            block = jax.lax.ppermute(block, axis_name, links)
        received.append(block)
    return jax.tree.map(lambda *blocks: jnp.concatenate(blocks), *received)
