"""Whole training steps against the official main.model_fn (tests/reference_data/train).

Five steps of a tiny network with every kind of block, in four recipes: RMSProp with an exponential
schedule, momentum with clipping and cosine, Adam with growing weight decay and a linear schedule,
and plain descent on a multi-label sigmoid loss.

Moving statistics: in these four runs the official graph never ran the layers' updates (all 32
equal their initial values after five steps), so there is nothing to compare with. That they move
as the official layer's do is tested here against NumPy, and layer by layer with blocks.npz in
tests/models.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from effv2_jax.config import base_config
from effv2_jax.convert import mapping, names_tf
from effv2_jax.models.network import create_model
from effv2_jax.models.variants import get_variant
from effv2_jax.training import step as steps
from effv2_jax.training.mesh import AXIS, batch_sharding, make_mesh, put_replicated
from effv2_jax.training.progressive import make_stages
from effv2_jax.training.recipe import decay_mask, make_recipe, parameter_path
from tests import reference

CASES = ("a_rmsprop", "b_momentum", "c_adam", "d_sigmoid")

# Official key of a case -> ours.
_TRAIN_KEYS = {
    "epochs": "epochs",
    "optimizer": "optimizer",
    "lr_sched": "schedule",
    "lr_base": "learning_rate",
    "lr_min": "min_learning_rate",
    "lr_warmup_epoch": "warmup_epochs",
    "lr_decay_epoch": "decay_epochs",
    "lr_decay_factor": "decay_factor",
    "gclip": "gradient_clip",
    "ema_decay": "ema_decay",
    "weight_decay": "weight_decay",
    "weight_decay_inc": "weight_decay_inc",
    "label_smoothing": "label_smoothing",
    "batch_size": "batch_size",
    "loss_type": "loss",
}


def facts() -> dict:
    return reference.load_json("train/train.json")


@functools.cache
def parts(case: str):
    """(model, recipe, stage) of a case."""
    entry = facts()["cases"][case]
    config = base_config()
    for key, value in entry["train"].items():
        config.train[_TRAIN_KEYS[key]] = value
    config.data.multilabel = entry["multilabel"]
    config.data.augment = "none"
    config.data.flip = False
    config.progressive.preset = "none"
    config.progressive.dropout_rate = 0.0
    config.progressive.magnitude = 0.0
    num_examples = int(facts()["steps_per_epoch"] * facts()["batch"])
    variant = get_variant("efficientnetv2-b0")
    stages = make_stages(config, variant=variant, num_examples=num_examples)
    recipe = make_recipe(
        config, stages=stages, num_examples=num_examples, num_classes=facts()["classes"]
    )
    model = create_model(
        "efficientnetv2-b0",
        num_classes=facts()["classes"],
        blocks=tuple(facts()["blocks"]),
        feature_size=facts()["model"]["feature_size"],
        survival_prob=0.0,
        axis_name=AXIS,
    )
    return model, recipe, stages[0]


def batch(case: str, step: int) -> dict[str, np.ndarray]:
    """The batch of a step; float32 images count as normalised and are not augmented."""
    n, size, classes = facts()["batch"], facts()["size"], facts()["classes"]
    rng = np.random.RandomState(600 + step)  # as in the reference
    if facts()["cases"][case]["multilabel"]:
        label = (rng.uniform(size=(n, classes)) < 0.3).astype(np.float32)
    else:
        label = rng.randint(0, classes, n).astype(np.int32)
    return {"image": reference.image(size, size, n, 600 + step), "label": label}


@dataclasses.dataclass
class Run:
    rows: list  # metrics of every step
    gradients: dict  # of the first step
    batch_statistics: list  # mean and unbiased variance of every step's batch
    state: steps.TrainState  # the last


@functools.cache
def run(case: str) -> Run:
    model, recipe, stage = parts(case)
    mesh = make_mesh(1)
    train_step = steps.make_train_step(model, recipe, mesh=mesh)
    # With momentum 0 the new moving statistics are those of the batch.
    observed = model.clone(bn_momentum=0.0)
    inside = jax.shard_map(
        lambda *arguments: steps.local_gradients(observed, recipe, *arguments),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    # One program for both: XLA finds what they have in common. Level 0: a third of the time to
    # compile, the same operations.
    program = jax.jit(
        lambda *arguments: (train_step(*arguments), inside(*arguments)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    state = steps.create_state(recipe, reference.train_variables(case))
    state = put_replicated(state, mesh)
    knobs = steps.stage_knobs(stage, recipe, seed=0)
    result = Run([], {}, [], state)
    for step in range(facts()["steps"]):
        placed = jax.device_put(batch(case, step), batch_sharding(mesh))
        (state, metrics), seen = program(state, placed, knobs)
        result.rows.append(jax.device_get(metrics))
        result.batch_statistics.append(jax.device_get(seen.batch_stats))
        result.gradients = result.gradients or jax.device_get(seen.gradients)
    result.state = jax.device_get(state)
    return result


def names(case: str) -> tuple[mapping.TensorName, ...]:
    return names_tf.tensor_names(parts(case)[0].block_specs)


def zero_gradient(case: str) -> list[str]:
    return facts()["cases"][case]["zero_gradient"]


def assert_close(found, expected, *, tolerance: float, what: str) -> None:
    """Largest error relative to the largest value of the tensor."""
    error = np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-12)
    assert error < tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("case", CASES)
def test_losses_rates_and_norms_of_every_step(case):
    rows = run(case).rows
    expected = facts()["cases"][case]["rows"]
    ours = {
        "loss": ("loss", 1e-5),
        "loss/xent": ("xent", 1e-5),
        "loss/l2reg": ("l2", 1e-6),
        "train/lr": ("lr", 1e-6),
        "train/weight_decay": ("weight_decay", 1e-6),
        "train/gnorm": ("grad_norm", 1e-5),
        "train/gnormmax": ("grad_norm_max", 1e-5),
    }
    for row, official in zip(rows, expected, strict=True):
        for theirs, (name, tolerance) in ours.items():
            if theirs in official:
                np.testing.assert_allclose(row[name], official[theirs], rtol=tolerance)
        assert row["finite"] == 1


@pytest.mark.parametrize("case", CASES)
def test_norm_of_every_gradient_of_the_first_step(case):
    found = mapping.from_variables(
        {"params": run(case).gradients}, [n for n in names(case) if n.path.startswith("params/")]
    )
    expected = facts()["cases"][case]["grad0_l2"]
    assert set(found) == set(expected)
    for name, norm in expected.items():
        # A gradient that is zero in exact arithmetic is rounding noise: compared absolutely.
        limit = 1e-6 if name in zero_gradient(case) else 5e-5 * norm
        assert abs(np.linalg.norm(found[name]) - norm) < limit, name


@pytest.mark.parametrize("case", ["a_rmsprop", "d_sigmoid"])
def test_gradients_of_the_first_step(case):
    found = mapping.from_variables(
        {"params": run(case).gradients}, [n for n in names(case) if n.path.startswith("params/")]
    )
    arrays = reference.load_npz(f"train/{case}.npz")
    checked = 0
    for name, value in found.items():
        expected = arrays[f"grad0/{name}"]
        if name in zero_gradient(case):
            np.testing.assert_allclose(value, expected, atol=1e-6)
        else:
            # Measured 7e-6, but 5e-5 for the beta of blocks_1's last norm, nearly all of which the
            # next norm removes; the same with two-pass statistics and plain convolutions.
            assert_close(value, expected, tolerance=1e-4, what=name)
        checked += 1
    assert checked == sum(key.startswith("grad0/") for key in arrays)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["final", "ema"])
def test_variables_after_five_steps(case, kind):
    state = run(case).state
    arrays = reference.load_npz(f"train/{case}.npz")
    if not any(key.startswith(f"{kind}/") for key in arrays):
        assert kind == "ema"
        assert state.ema == {}  # ema_decay 0
        return
    variables = (
        state.ema if kind == "ema" else {"params": state.params, "batch_stats": state.batch_stats}
    )
    found = mapping.from_variables(variables, names(case))
    assert {f"{kind}/{name}" for name in found} == {k for k in arrays if k.startswith(f"{kind}/")}
    # Adam divides by the size of gradients that are nearly zero (README of the reference data).
    tolerance = 2e-4 if case == "c_adam" else 1e-5
    for name, value in found.items():
        if "moving" in name:
            continue  # they did not move in the reference, see above
        if case == "c_adam" and name in zero_gradient(case):
            continue  # only rounding noise, made large by Adam
        assert_close(value, arrays[f"{kind}/{name}"], tolerance=tolerance, what=name)


@pytest.mark.parametrize("case", CASES)
def test_moving_statistics_and_their_average_follow_every_batch(case):
    result, decay = run(case), facts()["cases"][case]["train"]["ema_decay"]
    moving = reference.train_variables(case)["batch_stats"]
    average = moving
    for n, seen in enumerate(result.batch_statistics, start=1):
        rate = 1 - min(decay, (1 + n) / (10 + n))
        moving = jax.tree.map(lambda m, b: 0.9 * m + 0.1 * b, moving, seen)
        average = jax.tree.map(lambda a, m, rate=rate: a - rate * (a - m), average, moving)
    pairs = [(result.state.batch_stats, moving)]
    if decay:
        pairs.append((result.state.ema["batch_stats"], average))
    for found, expected in pairs:
        # float32 over five steps
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), found, expected
        )


@pytest.mark.parametrize("case", CASES)
def test_weight_decay_is_on_the_official_variables(case):
    recipe = parts(case)[1]
    params = reference.train_variables(case)["params"]
    mask = jax.tree_util.tree_flatten_with_path(decay_mask(recipe, params))[0]
    ours = {"params/" + parameter_path(path) for path, decays in mask if decays}
    official = {n.path for n in names(case) if n.theirs in facts()["cases"][case]["l2_variables"]}
    assert ours == official
    assert len(ours) == len(facts()["cases"][case]["l2_variables"])
