"""Mixup and CutMix on the device, over the global batch, as the official code does them.

Official: efficientnetv2/datasets.py (google/automl): mixup, cutmix_mask, cutmix, mixing.
Mixup: arXiv:1710.09412. CutMix: arXiv:1905.04899. An example's partner is found by reversing the
batch; with both, the first half gets mixup and the second CutMix, each reversed within itself.

Inside `jax.shard_map` the batch that is reversed is the global one: partners are exchanged
between devices, and an example's random numbers belong to its position in the global batch, so the
result does not depend on the number of devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effv2_jax.errors import UserError

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
    height, width = images.shape[1:3]

    def reversed_whole(batch: Batch) -> Batch:
        return _exchange(batch, slots=1, devices=devices, axis_name=axis_name)

    def reversed_halves(batch: Batch) -> Batch:
        return _exchange(batch, slots=2, devices=devices, axis_name=axis_name)

    def no_mixing(batch: Batch) -> Batch:
        return batch

    def only_mixup(batch: Batch) -> Batch:
        return _mixup(batch, reversed_whole(batch), _beta(keys, mixup_alpha))

    def only_cutmix(batch: Batch) -> Batch:
        mask, area = _boxes(keys, cutmix_alpha, height, width)
        everyone = jnp.ones((local,), bool)
        mean = _mean_area(area, everyone, height * width, axis_name)
        return _cutmix(batch, reversed_whole(batch), mask, mean)

    def both(batch: Batch) -> Batch:
        partner = reversed_halves(batch)
        second = position >= devices * local // 2
        mask, area = _boxes(keys, cutmix_alpha, height, width)
        mean = _mean_area(area, second, height * width, axis_name)
        mixed = _mixup(batch, partner, _beta(keys, mixup_alpha))
        cut = _cutmix(batch, partner, mask, mean)
        return jax.tree.map(lambda a, b: jnp.where(_column(second, a), b, a), mixed, cut)

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
    x: jax.Array, y: jax.Array, area: jax.Array, *, height: int, width: int
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
    keys: jax.Array, alpha: jax.Array | float, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Draws a box per example: masks float32 [n, H, W, 1] and their pixels int32 [n]."""

    def one(key: jax.Array, area: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_x, key_y = jax.random.split(key)
        x = jax.random.randint(key_x, (), 0, width)
        y = jax.random.randint(key_y, (), 0, height)
        top, bottom, left, right = cutmix_box(x, y, area, height=height, width=width)
        rows, columns = jnp.arange(height), jnp.arange(width)
        inside_y = (rows >= top) & (rows < bottom)
        inside_x = (columns >= left) & (columns < right)
        mask = (inside_y[:, None] & inside_x[None, :]).astype(jnp.float32)
        return mask[..., None], (bottom - top) * (right - left)

    place = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    return jax.vmap(one)(place, _beta(keys, alpha))


def _beta(keys: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """One sample of Beta(alpha, alpha) per key, float32 [n]."""
    alpha = jnp.asarray(alpha, jnp.float32)
    return jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)


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


def _exchange(batch: Batch, *, slots: int, devices: int, axis_name: str | None) -> Batch:
    """The partners of a batch whose `slots` equal parts are each reversed, globally.

    Device d holds the blocks d * slots .. d * slots + slots - 1 of the slots * D blocks of the
    global batch; part p of the batch is blocks p * D .. p * D + D - 1. A block comes whole from
    one other block of its part, reversed. All blocks of one slot come from the same slot of
    different devices (from the other one if D is even), so one permutation per slot suffices.
    """
    local = batch[0].shape[0]

    def block(x: jax.Array, slot: int) -> jax.Array:
        size = local // slots
        return x[slot * size : (slot + 1) * size][::-1]

    received = []
    for slot in range(slots):
        links, source_slot = [], slot
        for device in range(devices):
            part, offset = divmod(device * slots + slot, devices)
            source = part * devices + devices - 1 - offset
            source_slot = source % slots
            links.append((source // slots, device))
        send = jax.tree.map(lambda x, s=source_slot: block(x, s), batch)
        if axis_name is not None:
            send = jax.lax.ppermute(send, axis_name, links)
        received.append(send)
    return jax.tree.map(lambda *blocks: jnp.concatenate(blocks), *received)
