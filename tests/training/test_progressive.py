"""Stages: equal to the released code and the paper, and sound for any input."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from effv2_jax.config import base_config
from effv2_jax.errors import UserError
from effv2_jax.models.variants import get_variant, list_models
from effv2_jax.training import progressive
from effv2_jax.training.progressive import Stage, make_stages, plan_stages, resolve_image_size
from tests import reference

IMAGENET = 1_256_144  # images of the official training split

ENTRIES = [
    (model, dataset)
    for model, entries in reference.load_json("schedules.json")["models"].items()
    for dataset in entries
]


def official_config(model: str, dataset: str):
    """Our config of an official model x data set entry."""
    entry = reference.load_json("schedules.json")["models"][model][dataset]
    config = base_config()
    config.model.name = model
    config.train.batch_size = entry["batch_size"]
    config.train.epochs = float(entry["epochs"])
    config.train.min_steps = entry["min_steps"]
    if dataset != "imagenet":
        config.progressive.preset = "none"
        config.progressive.dropout_rate = entry["dropout"]
        config.progressive.mixup_alpha = 0.0
        config.progressive.cutmix_alpha = 0.0
        config.progressive.image_size = 224.0 if dataset == "imagenet21k" else 1.0
    return config, entry


@pytest.mark.parametrize(("model", "dataset"), ENTRIES)
def test_stages_equal_the_official_ones(model, dataset):
    config, entry = official_config(model, dataset)
    stages = make_stages(config, variant=get_variant(model), num_examples=entry["train_images"])
    found = [
        {
            "image_size": stage.image_size,
            "max_steps": stage.end_step,
            "ram": stage.magnitude,
            "mixup_alpha": stage.mixup_alpha,
            "cutmix_alpha": stage.cutmix_alpha,
            "dropout": stage.dropout_rate,
        }
        for stage in stages
    ]
    assert found == entry["stages"]
    length = progressive.schedule_length(config, num_examples=entry["train_images"])
    assert length == entry["train_steps_model_fn"]
    assert stages[-1].end_step == entry["train_steps_main"]


def test_all_official_entries_are_covered():
    assert len(ENTRIES) == 18 * 8
    assert {model for model, _ in ENTRIES} == set(list_models())


# Table 6 of the paper; sizes rounded down.
@pytest.mark.parametrize(
    ("model", "sizes", "magnitudes", "mixups", "dropouts"),
    [
        ("s", [128, 185, 242, 300], [5, 25 / 3, 35 / 3, 15], [0] * 4, [0.1, 1 / 6, 7 / 30, 0.3]),
        ("m", [128, 212, 296, 380], [5, 10, 15, 20], [0, 0.2 / 3, 0.4 / 3, 0.2],
         [0.1, 0.2, 0.3, 0.4]),
        ("l", [128, 212, 296, 380], [5, 35 / 3, 55 / 3, 25], [0, 0.5 / 3, 1 / 3, 0.5],
         [0.1, 0.7 / 3, 1.1 / 3, 0.5]),
    ],
)  # fmt: skip
def test_paper_preset_is_table_6(model, sizes, magnitudes, mixups, dropouts):
    config = base_config()
    config.progressive.preset = "paper"
    stages = make_stages(
        config, variant=get_variant(f"efficientnetv2-{model}"), num_examples=IMAGENET
    )
    assert [s.image_size for s in stages] == sizes
    assert [s.magnitude for s in stages] == pytest.approx(magnitudes)
    assert [s.mixup_alpha for s in stages] == pytest.approx(mixups)
    assert [s.dropout_rate for s in stages] == pytest.approx(dropouts)
    assert [s.cutmix_alpha for s in stages] == [0] * 4
    assert [round(s.epochs) for s in stages] == [87, 87, 87, 87]


def test_first_values_of_the_presets_are_those_of_the_papers_table():
    for model in ("s", "m", "l"):
        paper = get_variant(f"efficientnetv2-{model}").paper
        assert paper.image_size[0] == base_config().progressive.min_image_size
        assert paper.magnitude[0] == progressive.FIRST_MAGNITUDE
        assert paper.mixup_alpha[0] == progressive.FIRST_MIXUP_ALPHA
        assert paper.dropout_rate[0] == progressive.FIRST_PAPER_DROPOUT_RATE


def test_paper_preset_serves_models_outside_the_table_with_their_own_last_values():
    config = base_config()
    config.progressive.preset = "paper"
    stages = make_stages(config, variant=get_variant("efficientnet-b4"), num_examples=IMAGENET)
    assert [s.image_size for s in stages] == [128, 186, 245, 304]
    assert stages[-1].magnitude == 15
    assert [s.dropout_rate for s in stages] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_table_in_the_documentation_is_what_runs():
    text = (Path(__file__).parents[2] / "docs" / "progressive_learning.md").read_text()
    rows = re.findall(r"^\| (v2-\w+) \| (official|paper) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 11
    for model, preset, cells in rows:
        config = base_config()
        config.progressive.preset = preset
        variant = get_variant(f"efficientnet{model}")
        stages = make_stages(config, variant=variant, num_examples=IMAGENET)
        expected = [", ".join(str(stage.image_size) for stage in stages)]
        for name in ("magnitude", "mixup_alpha", "cutmix_alpha", "dropout_rate"):
            first, last = (f"{getattr(stages[i], name):.3g}" for i in (0, -1))
            expected.append(first if first == last else f"{first} to {last}")
        assert cells.split(" | ") == expected, (model, preset)


def test_number_of_stages_is_free():
    sizes = [
        s.image_size
        for s in plan_stages(
            num_examples=1000, batch_size=10, epochs=8, image_size=224, num_stages=8, magnitude=19
        )
    ]
    assert sizes == [140, 152, 164, 176, 188, 200, 212, 224]


def test_explicit_lists_replace_what_the_preset_says():
    config = base_config()
    config.train.batch_size = 100
    progressive_config = config.progressive
    progressive_config.image_sizes = (96, 64, 32)  # falling: people study this
    progressive_config.epochs = (1.0, 2.5, 0.5)
    progressive_config.magnitudes = (1.0, 2.0, 0.0)
    progressive_config.dropout_rates = (0.0, 0.5, 0.25)
    progressive_config.mixup_alphas = (0.3, 0.2, 0.1)
    progressive_config.cutmix_alphas = (0.0, 1.0, 2.0)
    progressive_config.batch_sizes = (100, 200, 50)
    stages = make_stages(config, variant=get_variant("efficientnetv2-s"), num_examples=1000)
    assert stages == (
        Stage(
            index=0, image_size=96, batch_size=100, start_step=0, end_step=10, first_example=0,
            epochs=1.0, magnitude=1.0, dropout_rate=0.0, mixup_alpha=0.3, cutmix_alpha=0.0,
            schedule_start=0.0, schedule_scale=1.0, lr_scale=1.0,
        ),
        Stage(
            index=1, image_size=64, batch_size=200, start_step=10, end_step=22, first_example=1000,
            epochs=2.4, magnitude=2.0, dropout_rate=0.5, mixup_alpha=0.2, cutmix_alpha=1.0,
            schedule_start=10.0, schedule_scale=2.0, lr_scale=2.0,
        ),
        # 2.5 epochs are 12.5 batches of 200: the half batch left over is trained here.
        Stage(
            index=2, image_size=32, batch_size=50, start_step=22, end_step=34, first_example=3400,
            epochs=0.6, magnitude=0.0, dropout_rate=0.25, mixup_alpha=0.1, cutmix_alpha=2.0,
            schedule_start=34.0, schedule_scale=0.5, lr_scale=0.5,
        ),
    )  # fmt: skip
    assert progressive.schedule_length(config, num_examples=1000) == 40.0


def test_listed_epochs_do_not_lose_a_step_to_rounding():
    stages = plan_stages(
        num_examples=1000, batch_size=10, epochs=1, image_size=32, preset="none",
        stage_epochs=(0.1, 0.7) * 5,  # 0.1 + 0.7 is 0.7999999999999999
    )  # fmt: skip
    assert [stage.steps for stage in stages] == [10, 70] * 5


def test_min_steps_lengthen_the_run():
    stages = plan_stages(
        num_examples=100, batch_size=10, epochs=1, min_steps=50, image_size=256, num_stages=2
    )
    assert [stage.end_step for stage in stages] == [25, 50]


@pytest.mark.parametrize(
    ("size", "reference_size", "expected"),
    [
        (None, 384, 384),
        (300, 384, 300),
        (0.8, 456, 352),
        (1.0, 260, 256),
        (16, 10, 160),
        (17, 10, 17),
    ],
)
def test_sizes_up_to_16_are_factors_of_the_evaluation_size(size, reference_size, expected):
    assert resolve_image_size(size, reference_size) == expected


def test_last_size_is_a_factor_of_the_configured_evaluation_size():
    config = base_config()
    config.eval.image_size = 256.0
    config.progressive.image_size = 0.5
    config.progressive.min_image_size = 64
    stages = make_stages(config, variant=get_variant("efficientnetv2-s"), num_examples=IMAGENET)
    assert [s.image_size for s in stages] == [80, 96, 112, 128]


@st.composite
def plans(draw) -> dict:
    """Arguments of `plan_stages`, among them lists of any kind."""
    n = draw(st.integers(1, 7))
    first_size, last_size = sorted(draw(st.lists(st.integers(1, 600), min_size=2, max_size=2)))
    arguments = {
        "num_examples": draw(st.integers(1, 10**6)),
        "batch_size": draw(st.integers(1, 5000)),
        "epochs": draw(st.floats(0.01, 400)),
        "image_size": last_size,
        "min_image_size": first_size,
        "magnitude": draw(st.floats(0, 30)),
        "dropout_rate": draw(st.floats(0, 0.9)),
        "mixup_alpha": draw(st.floats(0, 2)),
        "preset": draw(st.sampled_from(progressive.PRESETS)),
        "num_stages": n,
        "min_steps": draw(st.sampled_from([0, 10, 1000])),
    }
    if draw(st.booleans()):
        arguments["batch_sizes"] = draw(st.lists(st.integers(1, 5000), min_size=n, max_size=n))
    if draw(st.booleans()):
        epochs = st.floats(0.01, 100)
        arguments["stage_epochs"] = draw(st.lists(epochs, min_size=n, max_size=n))
        arguments["min_steps"] = 0
    return arguments


@settings(max_examples=300, deadline=None)
@given(plans())
def test_any_plan_covers_its_run_without_gap_and_counts_every_example(arguments):
    try:
        stages = plan_stages(**arguments)
    except UserError as error:
        # More stages than batches: the only reason to refuse any of these.
        if "has no step" not in str(error):
            raise
        event("refused")
        return
    n, batch_size = arguments["num_stages"], arguments["batch_size"]
    examples = arguments["num_examples"]
    assert [stage.index for stage in stages] == list(range(n))
    assert stages[0].start_step == stages[0].first_example == stages[0].schedule_start == 0
    for before, after in itertools.pairwise(stages):
        assert after.start_step == before.end_step
        assert after.first_example == before.first_example + before.steps * before.batch_size
        assert before.image_size <= after.image_size
    for stage in stages:
        assert stage.steps >= 1
        assert stage.schedule_start == stage.first_example / batch_size
        assert stage.schedule_scale == stage.lr_scale == stage.batch_size / batch_size
        assert stage.epochs * examples == pytest.approx(stage.steps * stage.batch_size)
        assert progressive.stage_at(stages, stage.start_step) is stage
        assert progressive.stage_at(stages, stage.end_step - 1) is stage
    # Length: within one batch of what was asked for, never more.
    seen = stages[-1].first_example + stages[-1].steps * stages[-1].batch_size
    if "stage_epochs" in arguments:
        wanted = sum(arguments["stage_epochs"]) * examples
    else:
        steps = max(arguments["min_steps"], int(arguments["epochs"] * examples // batch_size))
        wanted = steps * batch_size
    assert -1e-6 * wanted <= wanted - seen < stages[-1].batch_size
    if "batch_sizes" not in arguments:
        # With one batch size the schedule's steps are the steps, exactly.
        assert all(stage.schedule_start == stage.start_step for stage in stages)
        assert all(stage.schedule_step(stage.end_step) == stage.end_step for stage in stages)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["official", "paper"]), st.integers(1, 12), st.integers(1, 300),
    st.integers(300, 600), st.floats(5, 30), st.floats(0, 0.9),
)  # fmt: skip
def test_presets_grow_to_exactly_the_last_values(preset, n, first, last, magnitude, dropout):
    stages = plan_stages(
        num_examples=1000, batch_size=1, epochs=1, preset=preset, num_stages=n, image_size=last,
        min_image_size=first, magnitude=magnitude, dropout_rate=dropout,
    )  # fmt: skip
    for name, value in (("image_size", last), ("magnitude", magnitude), ("dropout_rate", dropout)):
        values = [getattr(stage, name) for stage in stages]
        assert values[-1] == value
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    if n > 1 and preset == "paper":
        assert stages[0].image_size == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "papper"}, "progressive.preset: 'papper' is none of official, paper, none"),
        ({"image_sizes": (128, 256), "epochs": (1.0, 2.0, 3.0)},
         "progressive.image_sizes has 2, progressive.epochs has 3"),
        ({"stages": 3, "image_sizes": (128, 256)},
         "progressive.stages = 3, progressive.image_sizes has 2"),
        ({"stages": 0}, "progressive.stages: 0 is impossible"),
        ({"image_sizes": (128, 0)}, "progressive.image_sizes: 0 of stage 1"),
        ({"image_sizes": (128, -32)}, "progressive.image_sizes: -32 of stage 1"),
        ({"batch_sizes": (0, 8)}, "progressive.batch_sizes: 0 of stage 0"),
        ({"epochs": (1.0, 0.0)}, "progressive.epochs: 0.0 of stage 1"),
        ({"magnitudes": (-1.0, 5.0)}, "progressive.magnitudes: -1.0 of stage 0"),
        ({"dropout_rates": (0.1, 1.0)}, "progressive.dropout_rates: 1.0 of stage 1"),
        ({"dropout_rate": 1.5}, "progressive.dropout_rates: 1.5 of stage"),
        ({"mixup_alphas": (float("nan"), 0.0)}, "progressive.mixup_alphas: nan of stage 0"),
        ({"min_image_size": 400}, "progressive.min_image_size: 400 px is more than"),
        ({"image_size": 0.01}, "progressive.image_size: 0.01 is a factor of 384 px"),
    ],
)  # fmt: skip
def test_impossible_values_are_named_by_their_key(change, message):
    config = base_config()
    for key, value in change.items():
        config.progressive[key] = value
    with pytest.raises(UserError) as caught:
        make_stages(config, variant=get_variant("efficientnetv2-s"), num_examples=IMAGENET)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "train.batch_size: 0"),
        ({"epochs": 0.0}, "train.epochs: 0.0"),
        ({"epochs": 0.01}, "stage 0 of 4 has no step"),
        ({"epochs": float("nan")}, "train.epochs: nan"),
    ],
)
def test_runs_without_steps_are_refused(change, message):
    config = base_config()
    config.train.update(change)
    with pytest.raises(UserError) as caught:
        make_stages(config, variant=get_variant("efficientnetv2-s"), num_examples=IMAGENET)
    assert message in str(caught.value)


def test_all_wrong_values_are_reported_together():
    with pytest.raises(UserError) as caught:
        plan_stages(
            num_examples=100, batch_size=1, epochs=1, image_size=32, image_sizes=(0, 32),
            dropout_rates=(2, 0),
        )  # fmt: skip
    assert "image_sizes: 0 of stage 0" in str(caught.value)
    assert "dropout_rates: 2 of stage 0" in str(caught.value)


def test_listed_epochs_shorter_than_min_steps_are_refused():
    with pytest.raises(UserError, match=r"fewer than train\.min_steps = 100"):
        plan_stages(
            num_examples=100, batch_size=10, epochs=1, image_size=32, preset="none",
            stage_epochs=(1,), min_steps=100,
        )  # fmt: skip


def test_step_outside_the_run_has_no_stage():
    stages = plan_stages(num_examples=100, batch_size=10, epochs=1, image_size=32, preset="none")
    with pytest.raises(IndexError, match="step 10 is outside the run's 10 steps"):
        progressive.stage_at(stages, 10)


def test_stages_are_frozen():
    stage = plan_stages(num_examples=100, batch_size=10, epochs=1, image_size=32, preset="none")[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage.image_size = 1


def test_planning_does_not_import_jax():
    code = "import sys, effv2_jax.training.progressive; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
