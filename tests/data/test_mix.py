"""Mixup and CutMix against the official code's results, and over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.data import mix as mix_module
from effv2_jax.data.mix import cutmix_box, cutmix_with, mix, mixup_with
from effv2_jax.errors import UserError
from tests import reference

# float32 products and sums of numbers of order 1.
TOLERANCE = 1e-6

# 24, 12, 8 and 6 examples on each of 1, 2, 3 and 4 devices.
BATCH = 24

ALPHAS = {"mixup": (0.3, 0.0), "cutmix": (0.0, 0.7), "both": (0.3, 0.7)}


@pytest.fixture
def official():
    return reference.load_npz("augment/mixing.npz")


def _assert_close(mixed, official, name):
    images, labels = mixed
    np.testing.assert_allclose(images, official[f"{name}_image"], atol=TOLERANCE)
    np.testing.assert_allclose(labels, official[f"{name}_label"], atol=TOLERANCE)


def _boxes_of(official):
    rx, ry, area = official["cutmix_rx_ry_area"].T
    height, width = official["image"].shape[1:3]
    boxes = [
        cutmix_box(int(x), int(y), area=jnp.float32(a), height=height, width=width)
        for x, y, a in zip(rx, ry, area, strict=True)
    ]
    return np.asarray(boxes)


def _given_samples(monkeypatch, official):
    """Makes `mix` use the official run's Beta samples and boxes instead of drawing them."""
    masks = jnp.asarray(official["cutmix_mask"])
    samples = jnp.asarray(official["beta_sample"][:, 0])
    monkeypatch.setattr(
        mix_module, "_boxes", lambda *_: (masks, jnp.sum(masks, axis=(1, 2, 3)).astype(jnp.int32))
    )
    monkeypatch.setattr(mix_module, "_beta_samples", lambda *_: jnp.stack([samples, samples]))


def _inputs():
    random = np.random.RandomState(0)
    images = random.randn(BATCH, 8, 10, 3).astype(np.float32)
    return images, np.eye(BATCH, dtype=np.float32)


@functools.cache
def _program(devices, use):
    """Jitted `mix` of (images, labels, key, alphas); with `devices`, in shard_map over as many."""

    def run(images, labels, key, alphas, axis_name=None):
        return mix(
            images,
            labels,
            key,
            mixup_alpha=alphas[0],
            cutmix_alpha=alphas[1],
            use_mixup=use[0],
            use_cutmix=use[1],
            axis_name=axis_name,
        )

    if devices is None:
        return jax.jit(run)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    split, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(run, axis_name="data"),
        mesh=mesh,
        in_specs=(split, split, same, same),
        out_specs=split,
        check_vma=False,
    )
    return jax.jit(sharded)


def _mix(images, labels, *, devices=None, alphas=(0.3, 0.7), use=(True, True)):
    program = _program(devices, use)
    return program(images, labels, jax.random.key(0), jnp.asarray(alphas, jnp.float32))


def test_mixup_equals_the_official_code(official):
    mixed = mixup_with(official["image"], official["label"], official["beta_sample"][:, 0])
    _assert_close(mixed, official, "mixup")


def test_cutmix_equals_the_official_code(official):
    mixed = cutmix_with(official["image"], official["label"], official["cutmix_mask"])
    _assert_close(mixed, official, "cutmix")


def test_cutmix_boxes_equal_the_official_masks(official):
    for (top, bottom, left, right), mask in zip(
        _boxes_of(official), official["cutmix_mask"], strict=True
    ):
        expected = np.zeros_like(mask)
        expected[top:bottom, left:right] = 1
        np.testing.assert_array_equal(mask, expected)


def test_mix_equals_the_official_code_given_its_samples(monkeypatch, official):
    _given_samples(monkeypatch, official)
    program = _program.__wrapped__(None, (True, True))  # not the one without the given samples
    for name, alphas in {**ALPHAS, "none": (0.0, 0.0)}.items():
        key, alphas = jax.random.key(0), jnp.asarray(alphas)
        mixed = program(official["image"], official["label"], key, alphas)
        _assert_close(mixed, official, name)


@pytest.mark.parametrize("name", list(ALPHAS))
def test_result_does_not_depend_on_the_number_of_devices(name):
    images, labels = _inputs()
    expected = _mix(images, labels, alphas=ALPHAS[name], devices=1)
    assert not np.array_equal(expected[0], images)
    for devices in (2, 3, 4):
        got = _mix(images, labels, alphas=ALPHAS[name], devices=devices)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{devices} devices")
    # Another program may fuse a product and a sum.
    for a, b in zip(_mix(images, labels, alphas=ALPHAS[name]), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_unused_kinds_of_mixing_are_left_out_of_the_program():
    images, labels = _inputs()
    for use, alphas in (((True, False), (0.3, 0.0)), ((False, True), (0.0, 0.7))):
        got = _mix(images, labels, use=use, alphas=(0.3, 0.7))
        expected = _mix(images, labels, use=(True, True), alphas=alphas)
        np.testing.assert_allclose(got[0], expected[0], atol=TOLERANCE)
    got = _mix(images, labels, use=(False, False))
    np.testing.assert_array_equal(got[0], images)


def test_another_alpha_needs_no_new_program():
    images, labels = _inputs()
    traces = []

    @jax.jit
    def run(mixup_alpha, cutmix_alpha):
        traces.append(1)
        return mix(
            images,
            labels,
            jax.random.key(0),
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            use_mixup=True,
            use_cutmix=True,
        )

    results = [run(jnp.float32(a), jnp.float32(c))[1] for a, c in ((0, 0), (0.2, 0), (1, 1))]
    assert len(traces) == 1
    np.testing.assert_array_equal(results[0], labels)
    assert not np.array_equal(results[1], labels)


def test_mixup_keeps_at_least_half_of_every_example():
    _, labels = _mix(*_inputs(), alphas=(1.0, 0.0))
    own = np.diag(labels)
    assert own.min() >= 0.5
    np.testing.assert_allclose(np.diag(labels[:, ::-1]), 1 - own, atol=TOLERANCE)
    assert np.unique(own).size == BATCH  # one weight per example, not per batch


def test_cutmix_mixes_all_labels_by_the_mean_area_of_the_boxes():
    images, labels = _inputs()
    mixed, mixed_labels = _mix(images, labels, alphas=(0.0, 1.0))
    pasted = np.all(mixed != images, axis=-1)
    assert np.unique(pasted.mean(axis=(1, 2))).size > 4
    np.testing.assert_allclose(np.diag(mixed_labels), 1 - pasted.mean(), atol=TOLERANCE)


def test_both_apply_mixup_to_the_first_half_and_cutmix_to_the_second():
    images, labels = _inputs()
    half = BATCH // 2
    mixed, mixed_labels = (np.asarray(x) for x in _mix(images, labels, alphas=(1.0, 1.0)))
    partner = np.concatenate([np.arange(half)[::-1], np.arange(half, BATCH)[::-1]])
    own = np.diag(mixed_labels)
    share = own[:half, None, None, None]
    blended = share * images[:half] + (1 - share) * images[partner[:half]]
    np.testing.assert_allclose(mixed[:half], blended, atol=TOLERANCE)
    second = mixed[half:]
    assert np.all((second == images[half:]) | (second == images[partner[half:]]))
    area = np.mean(second != images[half:])
    np.testing.assert_allclose(own[half:], 1 - area, atol=TOLERANCE)
    np.testing.assert_allclose(mixed_labels.sum(axis=1), 1, atol=TOLERANCE)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_samples_follow_the_beta_distribution(alpha):
    keys = jax.random.split(jax.random.key(0), 20_000)
    samples = np.asarray(jax.jit(mix_module._beta_samples)(keys, jnp.asarray([alpha, alpha])))
    variance = 1 / (4 * (2 * alpha + 1))
    # Five standard errors of the mean; the variance of 20,000 samples is good to 5 %.
    assert abs(samples.mean(axis=1) - 0.5).max() < 5 * np.sqrt(variance / 20_000)
    np.testing.assert_allclose(samples.var(axis=1), variance, rtol=0.05)
    assert abs(np.corrcoef(samples)[0, 1]) < 0.05


def test_alpha_0_draws_finite_samples():
    keys = jax.random.split(jax.random.key(0), 4)
    assert np.isfinite(mix_module._beta_samples(keys, jnp.zeros(2))).all()


def test_the_mean_area_of_a_batch_beyond_int32_is_exact():
    pixels = 1 << 20
    area = jnp.full((5000,), pixels - 1, jnp.int32)
    counted = jnp.arange(5000) < 4000
    mean = mix_module._mean_area(area, counted, pixels, None)
    np.testing.assert_allclose(mean, (pixels - 1) / pixels, rtol=1e-7)


def test_mixup_with_cutmix_refuses_an_odd_batch_by_name():
    with pytest.raises(UserError, match=r"3 examples.*train\.batch_size"):
        _mix(np.zeros((3, 8, 10, 3), np.float32), np.eye(3, dtype=np.float32))
