"""The training and evaluation step: devices, knobs, randomness, what is skipped, what is frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax.data.policy import make_policy
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model
from effv2_jax.training import step as steps
from effv2_jax.training.losses import example_losses
from effv2_jax.training.mesh import AXIS, batch_sharding, make_mesh, put_replicated
from effv2_jax.training.progressive import plan_stages
from effv2_jax.training.recipe import Images, Recipe
from effv2_jax.training.schedules import make_schedule

CLASSES = 7
SIZE = 24
BATCH = 8

# A third of the time to compile; what is compared is compiled alike.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_recipe(**changes) -> Recipe:
    """Everything off that `changes` does not turn on."""
    values = {
        "num_classes": CLASSES,
        "schedule": make_schedule("linear", 0.1, total_steps=100),
        "total_steps": 100.0,
        "optimizer": "momentum",
        **changes,
    }
    return Recipe(**values)


EVERYTHING = Images(
    flip=True, policy=make_policy("randaugment", layers=1), cutout=True, random_erasing=0.5,
    use_mixup=True, use_cutmix=True,
)  # fmt: skip


@functools.cache
def network(blocks=("r1_k3_s2_e1_i8_o8_c1",), survival_prob=1.0, dtype=jnp.float32):
    return create_model(
        "testing", CLASSES, blocks=blocks, feature_size=8, survival_prob=survival_prob,
        lowering="plain", axis_name=AXIS, dtype=dtype,
    )  # fmt: skip


@functools.cache
def stages():
    """Three stages that differ in everything but the shapes."""
    return plan_stages(
        num_examples=80, batch_size=BATCH, epochs=3, image_size=SIZE, preset="none",
        stage_epochs=(1, 1, 1), magnitudes=(5, 10, 15), dropout_rates=(0, 0.3, 0.6),
        mixup_alphas=(0, 0.4, 0.4), cutmix_alphas=(0, 0, 1.0),
    )  # fmt: skip


def make_batch(seed: int = 0, label: str = "int") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, BATCH, dtype=np.int32)
    if label == "multi":
        labels = (rng.random((BATCH, CLASSES)) < 0.4).astype(np.float32)
    return {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8),
        "label": labels,
    }


def start(recipe: Recipe, mesh, model=None) -> steps.TrainState:
    variables = init_variables(model or network(), 0, SIZE)
    return put_replicated(steps.create_state(recipe, variables), mesh)


def put(batch, mesh):
    return jax.device_put(batch, batch_sharding(mesh))


def assert_trees_close(found, expected, *, tolerance: float) -> None:
    """Largest error of every leaf, relative to its largest value."""

    def check(a, b) -> None:
        scale = max(np.max(np.abs(b), initial=0), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)

    jax.tree.map(check, found, expected)


def assert_trees_equal(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@dataclasses.dataclass
class Trained:
    metrics: list  # of every step, on the host
    first: steps.TrainState  # after the first step
    last: steps.TrainState
    programs: int  # compiled


@functools.cache
def train_with_everything(devices: int) -> Trained:
    """Two steps in each of three stages, with every random thing switched on."""
    model = network(("r1_k3_s2_e1_i8_o8_c1", "r2_k3_s1_e2_i8_o8_se0.25"), survival_prob=0.5)
    recipe = make_recipe(
        images=EVERYTHING, ema_decay=0.9, weight_decay=1e-2, label_smoothing=0.1, gradient_clip=1.0
    )
    mesh = make_mesh(devices)
    program = compiled(steps.make_train_step(model, recipe, mesh=mesh), donate_argnums=0)
    state = start(recipe, mesh, model)
    metrics, first = [], None
    for index, stage in enumerate(stages()):
        knobs = put_replicated(steps.stage_knobs(stage, recipe, seed=3), mesh)
        for step in (2 * index, 2 * index + 1):
            state, found = program(state, put(make_batch(step), mesh), knobs)
            metrics.append(jax.device_get(found))
            first = first or jax.device_get(state)
    return Trained(metrics, first, jax.device_get(state), program._cache_size())


def test_results_do_not_depend_on_the_number_of_devices():
    one, four = train_with_everything(1), train_with_everything(4)
    for a, b in zip(one.metrics, four.metrics, strict=True):
        assert_trees_close(a, b, tolerance=5e-6)
    # The sums over the batch have another order: float32, measured 5e-6.
    assert_trees_close(one.first, four.first, tolerance=3e-5)
    assert_trees_close(one.last, four.last, tolerance=3e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_new_knobs_need_no_new_program(devices):
    assert train_with_everything(devices).programs == 1


def test_metrics_are_finite_float32_scalars():
    for metrics in train_with_everything(4).metrics:
        assert set(metrics) == {
            "loss", "xent", "l2", "lr", "weight_decay", "grad_norm", "grad_norm_max", "top1",
            "finite",
        }  # fmt: skip
        for name, value in metrics.items():
            assert value.dtype == np.float32, name
            assert value.shape == ()
            assert np.isfinite(value)
        assert metrics["loss"] == pytest.approx(metrics["xent"] + metrics["l2"])


def test_state_counts_its_steps_and_averages_parameters_and_statistics():
    state = train_with_everything(1).last
    assert state.step == 6
    assert state.skipped == 0
    assert set(state.ema) == {"params", "batch_stats"}
    assert jax.tree.structure(state.ema["params"]) == jax.tree.structure(state.params)
    mean = state.batch_stats["stem"]["norm"]["mean"]
    assert np.any(mean != 0)
    assert not np.array_equal(state.ema["batch_stats"]["stem"]["norm"]["mean"], mean)


@functools.cache
def simple(**changes):
    """(program on one device, recipe, mesh) of the one-block network."""
    recipe = make_recipe(**changes)
    mesh = make_mesh(1)
    return compiled(steps.make_train_step(network(), recipe, mesh=mesh)), recipe, mesh


def one_step(batch, stage=None, seed: int = 0, state=None, **changes):
    program, recipe, mesh = simple(**changes)
    knobs = steps.stage_knobs(stage or stages()[0], recipe, seed=seed)
    state = put_replicated(state or start(recipe, mesh), mesh)
    return jax.device_get(program(state, put(batch, mesh), knobs))


def test_a_step_depends_on_seed_and_step_only():
    stage = stages()[1]  # dropout 0.3
    recipe = simple()[1]
    first = one_step(make_batch(), stage)
    again = one_step(make_batch(), stage)
    assert_trees_equal(first, again)
    other_seed = one_step(make_batch(), stage, seed=1)
    assert other_seed[1]["loss"] != first[1]["loss"]
    later = start(recipe, make_mesh(1)).replace(step=jnp.int32(1))
    assert one_step(make_batch(), stage, state=later)[1]["xent"] != first[1]["xent"]


def test_images_are_normalised_and_float_images_are_taken_as_they_are():
    batch = make_batch()
    ready = {**batch, "image": (batch["image"].astype(np.float32) - 128) / 128}
    raw, normalised = one_step(batch), one_step(ready)
    assert raw[1]["loss"] == pytest.approx(normalised[1]["loss"], rel=1e-6)
    assert_trees_close(raw[0].params, normalised[0].params, tolerance=1e-6)


def test_float_images_are_not_augmented():
    recipe = make_recipe(images=dataclasses.replace(EVERYTHING, use_mixup=False, use_cutmix=False))
    images = jnp.asarray(make_batch()["image"], jnp.float32)
    found, labels = steps.prepare_images(
        {"image": images, "label": jnp.arange(BATCH) % CLASSES}, {}, {}, recipe
    )
    assert found is images
    np.testing.assert_array_equal(labels, np.eye(CLASSES)[np.arange(BATCH) % CLASSES])


def test_dropout_rate_of_the_stage_is_used():
    losses = [float(one_step(make_batch(), stage)[1]["xent"]) for stage in stages()]
    assert len(set(losses)) == 3


def test_learning_rate_and_decay_follow_the_schedule_of_the_stage():
    stage = dataclasses.replace(
        stages()[1], start_step=4, end_step=9, schedule_start=10.0, schedule_scale=2.0, lr_scale=2.0
    )
    changes = {"weight_decay": 0.01, "weight_decay_inc": 3.0}
    state = start(simple(**changes)[1], make_mesh(1)).replace(step=jnp.int32(7))
    metrics = one_step(make_batch(), stage, state=state, **changes)[1]
    # base step 10 + 2 * (7 - 4) = 16 of 100
    assert metrics["lr"] == pytest.approx(0.1 * (1 - 0.16) * 2, rel=1e-6)
    assert metrics["weight_decay"] == pytest.approx(0.01 * (1 + 3 * 0.16), rel=1e-6)


def test_top1_of_the_training_batch_counts_the_largest_label():
    # A classifier that always answers class 2, by its bias.
    recipe, mesh = simple()[1:]
    state = start(recipe, mesh)
    params = dict(state.params)
    params["classifier"] = {
        "kernel": jnp.zeros_like(params["classifier"]["kernel"]),
        "bias": jnp.zeros(CLASSES).at[2].set(5.0),
    }
    batch = make_batch()
    batch["label"] = np.int32([2, 2, 2, 0, 1, 2, 3, 4])
    assert one_step(batch, state=state.replace(params=params))[1]["top1"] == 0.5
    soft = np.full((BATCH, CLASSES), 0.1, np.float32)
    soft[:3, 2] = 0.4
    soft[3:, 1] = 0.4
    batch["label"] = soft
    assert one_step(batch, state=state.replace(params=params))[1]["top1"] == 0.375


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    changes = {"weight_decay": 0.01, "ema_decay": 0.9}
    recipe, mesh = simple(**changes)[1:]
    state = start(recipe, mesh)
    batch = make_batch()
    bad = (batch["image"].astype(np.float32) - 128) / 128
    bad[3, 5, 5, 1] = np.nan
    after, metrics = one_step({**batch, "image": bad}, state=state, **changes)
    assert metrics["finite"] == 0
    assert np.isnan(metrics["loss"])
    assert after.step == 1
    assert after.skipped == 1
    for name in ("params", "batch_stats", "opt_state", "ema"):
        assert_trees_equal(getattr(after, name), getattr(state, name))
    good, metrics = one_step(batch, state=after, **changes)
    assert metrics["finite"] == 1
    assert (good.step, good.skipped) == (2, 1)
    kernels = [tree.params["stem"]["conv"]["kernel"] for tree in (good, state)]
    assert not np.array_equal(*kernels)


def test_frozen_parameters_and_their_statistics_stay_and_do_not_decay():
    changes = {
        "freeze": "(stem|blocks_0)/", "weight_decay": 0.1, "decoupled_weight_decay": 0.1,
        "ema_decay": 0.9, "gradient_clip": 1.0,
    }  # fmt: skip
    recipe, mesh = simple(**changes)[1:]
    state = start(recipe, mesh)
    after, metrics = one_step(make_batch(), state=state, **changes)
    for part in ("stem", "blocks_0"):
        assert_trees_equal(after.params[part], state.params[part])
        assert_trees_equal(after.ema["params"][part], state.params[part])
    for part in ("head", "classifier"):
        kernels = [p for p in jax.tree.leaves(after.params[part]) if p.ndim > 1]
        before = [p for p in jax.tree.leaves(state.params[part]) if p.ndim > 1]
        assert all(not np.array_equal(a, b) for a, b in zip(kernels, before, strict=True))
    for part in ("stem", "blocks_0"):
        assert_trees_equal(after.batch_stats[part], state.batch_stats[part])
        assert_trees_equal(after.ema["batch_stats"][part], state.batch_stats[part])
    assert np.any(after.batch_stats["head"]["norm"]["mean"] != 0)
    l2 = sum(
        0.05 * float(np.sum(np.square(p)))
        for part in ("head", "classifier")
        for p in jax.tree.leaves(state.params[part])
        if p.ndim > 1
    )
    assert metrics["l2"] == pytest.approx(l2, rel=1e-5)


def test_average_off_leaves_no_average():
    assert one_step(make_batch())[0].ema == {}


def test_donated_state_does_not_share_buffers():
    recipe = make_recipe(ema_decay=0.9)
    variables = jax.tree.map(jnp.asarray, init_variables(network(), 0, SIZE))
    state = steps.create_state(recipe, variables)
    trees = (variables["params"], state.params, state.ema["params"])
    pointers = [leaf.unsafe_buffer_pointer() for tree in trees for leaf in jax.tree.leaves(tree)]
    assert len(set(pointers)) == len(pointers)


def test_parameters_and_statistics_stay_float32_when_the_network_computes_in_bfloat16():
    recipe = make_recipe(ema_decay=0.9, optimizer="rmsprop", weight_decay=1e-5)
    mesh = make_mesh(4)
    model = network(dtype=jnp.bfloat16)
    state = steps.create_state(recipe, init_variables(model, 0, SIZE))
    knobs = steps.stage_knobs(stages()[0], recipe, seed=0)
    shapes = jax.eval_shape(
        steps.make_train_step(model, recipe, mesh=mesh), state, make_batch(), knobs
    )
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.shape == b.shape, shapes[0], state)
    assert all(jax.tree.leaves(same))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(shapes[1]))


@functools.cache
def eval_program(loss: str = "softmax", multilabel: bool = False, devices: int = 4):
    mesh = make_mesh(devices)
    recipe = make_recipe(loss=loss, multilabel=multilabel, label_smoothing=0.1)
    return compiled(steps.make_eval_step(network(), recipe, mesh=mesh)), mesh


def eval_batch(label: str = "int") -> dict[str, np.ndarray]:
    """Eleven images in two batches; the last one is half padding."""
    batch = make_batch(5, label)
    batch["image"] = batch["image"].astype(np.float32) + 0.25  # as resizing leaves them
    batch["mask"] = np.float32([1, 1, 1, 0, 1, 1, 0, 0])
    return batch


@pytest.mark.parametrize(
    ("loss", "label"), [("softmax", "int"), ("softmax", "multi"), ("sigmoid", "multi")]
)
def test_evaluation_sums_equal_numpy_over_the_unmasked_images(loss, label):
    program, mesh = eval_program(loss, label == "multi")
    variables = init_variables(network(), 1, SIZE)
    variables["batch_stats"]["stem"]["norm"]["mean"] += 0.1
    batch = eval_batch(label)
    if label == "multi":
        batch["label"][:, 0] = 1  # every image has a label
        batch["label"][3] = 0  # padding: no label, its loss is not a number
    found = program(put_replicated(variables, mesh), put(batch, mesh))
    single = network().clone(axis_name=None)
    logits = np.asarray(single.apply(variables, (batch["image"] - 128) / 128))
    labels = batch["label"] if label == "multi" else np.eye(CLASSES)[batch["label"]]
    rows = batch["mask"] > 0
    order = np.argsort(-logits, axis=1)
    hits = np.take_along_axis(labels, order, axis=1) > 0
    losses = example_losses(
        jnp.asarray(logits),
        jnp.asarray(labels, jnp.float32),
        kind=loss,
        multilabel=label == "multi",
    )
    assert found["count"] == 5
    assert found["top1"] == hits[rows, 0].sum()
    assert found["top5"] == hits[rows, :5].any(1).sum()
    # no label smoothing, no L2
    np.testing.assert_allclose(found["loss"], np.asarray(losses)[rows].sum(), rtol=1e-5)


def test_a_fully_masked_batch_counts_nothing():
    program, mesh = eval_program()
    batch = {**eval_batch(), "mask": np.zeros(BATCH, np.float32)}
    variables = put_replicated(init_variables(network(), 1, SIZE), mesh)
    assert all(
        value == 0 for value in jax.device_get(program(variables, put(batch, mesh))).values()
    )
