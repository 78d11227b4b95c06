"""Policies, their randomness, flip, cutout and erasing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.data import augment as augment_module
from effv2_jax.data.augment import augment, finetune_cutout, flip, random_erasing
from effv2_jax.data.policy import (
    AUTOAUGMENT_V0,
    IDENTITY,
    OPERATIONS,
    POLICIES,
    SIGNED,
    make_policy,
    operation_arguments,
)
from effv2_jax.errors import UserError

DRAWS = 20_000
BATCH = 24

_augment = jax.jit(augment, static_argnames=("policy", "implementation"))


def _keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def _images(count=BATCH, height=24, width=28):
    random = np.random.RandomState(0)
    coarse = random.randint(0, 256, (count, height // 4, width // 4, 3)).astype(np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@functools.cache
def _drawn(policy, magnitude=9.0, size=(24, 28)):
    """Operations [DRAWS, L], arguments [DRAWS, L, 2] and centres [DRAWS, L, 2]."""
    draw = augment_module._drawer(policy, jnp.asarray(policy.table(magnitude)), size)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(_keys(DRAWS)))


def _assert_share(share, expected, count=DRAWS):
    """Five standard errors: fails by chance once in a million."""
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)


def test_all_implementations_give_the_same_bits():
    policy = make_policy("ra_aa", layers=3)
    images, keys = _images(), _keys(BATCH)
    results = [
        np.asarray(_augment(images, keys, policy.table(11.5), policy=policy, implementation=way))
        for way in ("map", "batch", "auto")
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert np.any(results[0] != images, axis=(1, 2, 3)).mean() > 0.5


def test_policy_none_and_no_layers_change_nothing():
    images, keys = _images(), _keys(BATCH)
    for policy in (make_policy("none"), make_policy("randaugment", layers=0)):
        assert augment(images, keys, policy.table(9.0), policy) is images


def test_an_image_depends_on_its_key_alone():
    policy = make_policy("ra_aa", layers=3)
    images, keys, table = _images(), _keys(BATCH), policy.table(9.0)
    whole = np.asarray(_augment(images, keys, table, policy=policy, implementation="auto"))
    order = np.asarray([5, 3, 20, 7])
    part = _augment(images[order], keys[order], table, policy=policy, implementation="auto")
    np.testing.assert_array_equal(part, whole[order])
    alike = np.repeat(images[:1], BATCH, axis=0)
    same = _augment(alike, keys, table, policy=policy, implementation="auto")
    assert len(np.unique(np.asarray(same).reshape(BATCH, -1), axis=0)) > BATCH // 2


def test_result_does_not_depend_on_the_number_of_devices():
    policy = make_policy("ra_aa", layers=3)
    images, keys, table = _images(), _keys(BATCH), policy.table(9.0)
    expected = _augment(images, keys, table, policy=policy, implementation="auto")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("data",))
    split, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(augment, policy=policy),
        mesh=mesh,
        in_specs=(split, split, same),
        out_specs=split,
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(sharded)(images, keys, table), expected)


def test_another_magnitude_needs_no_new_program():
    policy = make_policy("randaugment")
    images, keys = _images(4), _keys(4)
    traces = []

    @jax.jit
    def run(table):
        traces.append(1)
        return augment(images, keys, table, policy)

    weak, strong = run(policy.table(5.0)), run(policy.table(15.5))
    assert len(traces) == 1
    assert not np.array_equal(weak, strong)


def test_randaugment_draws_the_16_operations_equally_often():
    operations, _, _ = _drawn(make_policy("randaugment"))
    assert operations.shape == (DRAWS, 2)
    for layer in range(2):
        counts = np.bincount(operations[:, layer], minlength=16)
        assert len(counts) == 16
        for count in counts:
            _assert_share(count / DRAWS, 1 / 16)
    _assert_share(np.mean(operations[:, 0] == operations[:, 1]), 1 / 16)


def test_signed_operations_go_both_ways_equally_often_and_the_others_one_way():
    operations, arguments, _ = _drawn(make_policy("randaugment"))
    for index, name in enumerate(OPERATIONS):
        drawn = arguments[operations == index]
        first, second = operation_arguments(name, 9.0, cutout=40, translate=100)
        expected = np.asarray([first, second], np.float32)
        if name not in SIGNED:
            assert np.all(drawn == expected), name
            continue
        flipped = expected * ((1, -1) if name == "Rotate" else (-1, 1))
        is_flipped = np.all(drawn == flipped, axis=1)
        assert np.all(is_flipped | np.all(drawn == expected, axis=1)), name
        _assert_share(is_flipped.mean(), 0.5, len(drawn))


def test_centres_of_cutout_cover_the_image_uniformly():
    _, _, centres = _drawn(make_policy("randaugment"), size=(24, 28))
    for axis, size in enumerate((24, 28)):
        counts = np.bincount(centres[:, 0, axis], minlength=size)
        assert len(counts) == size
        for count in counts:
            _assert_share(count / DRAWS, 1 / size)


def test_autoaugment_draws_every_pair_and_applies_its_probabilities():
    operations, arguments, _ = _drawn(make_policy("autoaugment"))
    # What each pair gives: its operations, each applied or not.
    expected = np.zeros((17, 17))
    for (first, p, _), (second, q, _) in AUTOAUGMENT_V0:
        i, j = OPERATIONS.index(first), OPERATIONS.index(second)
        for a, chance_a in ((i, p), (IDENTITY, 1 - p)):
            for b, chance_b in ((j, q), (IDENTITY, 1 - q)):
                expected[a, b] += chance_a * chance_b / 25
    drawn = np.zeros((17, 17))
    np.add.at(drawn, tuple(operations.T), 1 / DRAWS)
    assert np.all(drawn[expected == 0] == 0)
    for share, probability in zip(drawn[expected > 0], expected[expected > 0], strict=True):
        _assert_share(share, probability)
    # Magnitudes are the policy's own: Solarize has 2, 3, 4, 8 and 10, of which 10 wraps to 0.
    solarize = arguments[operations == OPERATIONS.index("Solarize")][:, 0]
    assert set(np.unique(solarize)) == {51, 76, 102, 204, 0}


def test_ra_aa_gives_half_of_the_images_each_policy():
    operations, _, _ = _drawn(make_policy("ra_aa", layers=3))
    assert operations.shape == (DRAWS, 3)
    # RandAugment fills the third layer, AutoAugment leaves it empty.
    _assert_share(np.mean(operations[:, 2] == IDENTITY), 0.5)
    brightness = np.any(operations == OPERATIONS.index("Brightness"), axis=1)  # RandAugment only
    _assert_share(brightness.mean(), 0.5 * (1 - (15 / 16) ** 3))


def test_table_follows_the_magnitude_with_the_official_truncations():
    table = dict(zip(OPERATIONS, make_policy("randaugment").table(7.7), strict=True))
    assert table["Posterize"][0] == 8 - 3  # int(0.77 * 4)
    assert table["Solarize"][0] == 197  # int(0.77 * 256)
    assert table["SolarizeAdd"][0] == 84
    assert table["Cutout"][0] == 30
    assert table["Color"][0] == np.float32(0.77 * 1.8 + 0.1)
    assert table["TranslateX"][0] == np.float32(77)
    np.testing.assert_allclose(table["Rotate"], [np.cos(0.4031711), np.sin(0.4031711)], rtol=1e-6)
    assert make_policy("randaugment").table(15)[4, 0] == 2  # 6 bits stay
    assert make_policy("randaugment").table(25)[4, 0] == 7  # a negative shift wraps


@pytest.mark.parametrize("name", POLICIES)
def test_table_has_the_rows_that_the_policy_promises(name):
    policy = make_policy(name)
    assert policy.table(3.0).shape == (policy.table_rows, 2)
    assert policy.table(3.0).dtype == np.float32
    assert hash(policy) == hash(make_policy(name))


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(UserError, match=r"'randaug' is unknown, did you mean 'randaugment'"):
        make_policy("randaug")


@pytest.mark.parametrize("magnitude", [-1.0, float("nan"), float("inf")])
def test_an_impossible_magnitude_is_refused(magnitude):
    with pytest.raises(UserError, match="magnitude"):
        make_policy("randaugment").table(magnitude)


def test_other_impossible_arguments_are_refused():
    policy = make_policy("randaugment")
    with pytest.raises(UserError, match="-1 layers"):
        make_policy("randaugment", layers=-1)
    with pytest.raises(UserError, match="implementation is 'vmap'"):
        _augment(_images(1), _keys(1), policy.table(5.0), policy=policy, implementation="vmap")
    with pytest.raises(UserError, match=r"shape \(66, 2\).*\(16, 2\)"):
        augment(_images(1), _keys(1), make_policy("ra_aa").table(5.0), policy)


def test_flip_mirrors_half_of_the_images():
    count = 4000
    images = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None], (count, 2, 6, 3))
    flipped = np.asarray(jax.jit(flip)(images, _keys(count)))
    mirrored = flipped[:, 0, 0, 0] == 5
    _assert_share(mirrored.mean(), 0.5, count)
    np.testing.assert_array_equal(flipped[mirrored], images[mirrored][:, :, ::-1])
    np.testing.assert_array_equal(flipped[~mirrored], images[~mirrored])


def test_finetune_cutout_fills_a_square_of_half_the_side_with_uniform_noise():
    count, size = 400, 16
    images = np.full((count, size, size, 3), -5, np.float32)
    result = np.asarray(jax.jit(finetune_cutout)(images, _keys(count)))
    box = np.any(result != -5, axis=-1)
    noise = result[box]
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(noise.std() - np.sqrt(1 / 12)) < 0.01
    assert np.unique(noise).size > 0.99 * noise.size  # its own value for each pixel and channel
    # A centre at c covers c - 4 .. c + 3, cut at the border: 4 to 8 rows, 8 for 9 centres of 16.
    for axis in (1, 2):
        sides = box.any(axis=3 - axis).sum(axis=1)
        assert set(sides) == {4, 5, 6, 7, 8}
        _assert_share(np.mean(sides == 8), 9 / 16, count)
    np.testing.assert_array_equal(
        box.sum(axis=(1, 2)), box.any(axis=1).sum(axis=1) * box.any(axis=2).sum(axis=1)
    )


def test_random_erasing_fills_boxes_of_the_right_area_and_shape_with_normal_noise():
    count, height, width = 1000, 40, 32
    images = np.full((count, height, width, 2), 9, np.float32)
    result = np.asarray(jax.jit(random_erasing)(images, _keys(count), 0.6))
    erased = np.any(result != 9, axis=-1)
    hit = erased.any(axis=(1, 2))
    _assert_share(hit.mean(), 0.6, count)
    heights, widths = erased.any(axis=2).sum(axis=1)[hit], erased.any(axis=1).sum(axis=1)[hit]
    areas = erased.sum(axis=(1, 2))[hit]
    np.testing.assert_array_equal(areas, heights * widths)
    # Rounded sides move the area of a long box by up to a fifth.
    share = areas / (height * width)
    assert 0.015 < share.min() < 0.04
    assert 0.3 < share.max() < 0.36
    ratio = heights / widths
    assert 0.2 < ratio.min() < 0.5
    assert 2 < ratio.max() < 4
    noise = result[erased]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_random_erasing_without_a_fitting_box_or_chance_changes_nothing():
    images = np.ones((8, 10, 10, 3), np.float32)
    never = jax.jit(random_erasing)(images, _keys(8), 0.0)
    np.testing.assert_array_equal(never, images)
    erase_all = functools.partial(random_erasing, area=(1.0, 1.0), aspect=(1.0, 1.0))
    np.testing.assert_array_equal(jax.jit(erase_all)(images, _keys(8), 1.0), images)


def test_one_key_serves_independent_changes():
    """Flip and erasing of the same key are not correlated."""
    count = 2000
    images = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None], (count, 8, 8, 1))
    mirrored = np.asarray(jax.jit(flip)(images, _keys(count)))[:, 0, 0, 0] == 7
    result = np.asarray(jax.jit(random_erasing)(images, _keys(count), 0.5))
    erased = np.any(result != images, axis=(1, 2, 3))
    _assert_share(np.mean(mirrored & erased), 0.25, count)
