"""Results as they are kept: ratios, tables, rows of the CSV, and what need not be repeated."""

import csv
import sys
from pathlib import Path

import pytest

from effv2_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from benchmarks import contest, counts  # noqa: E402
from benchmarks.results import Case, Results, read, records, settings, table  # noqa: E402

from effv2_jax.models.variants import get_variant  # noqa: E402

RATES = {"matmul_flops": {"float32": 1e11}, "copy_bytes": 1e10}


def _case(**changes):
    return Case(**{
        "model": "efficientnetv2-b0", "image_size": 192, "batch": 8, "dtype": "float32",
        "cores": 1, "mode": "train", **changes,
    })  # fmt: skip


def _contestant(name, **asked):
    return contest.Contestant(name=name, command=(), task={}, asked=asked)


def _measured(contestant, seconds, **facts):
    return contest.Measured(
        contestant=contestant,
        facts={
            "compile_seconds": 1.0,
            "settings": "eager",
            "versions": {"torch": "2"},
            "param_count": 7_000_000,
            "device": "cpu",
            **facts,
        },
        rounds=[(wall, wall) for wall in seconds],
        memory={"resident_bytes": 3 * 2**20, "device_bytes": None, "step_bytes": 2**20},
        steps=1,
        in_turns=True,
    )


OURS = _contestant("effv2_jax", lowering="auto")
TIMM = _contestant("timm", compile="auto")


def _found(case, ours=(0.2, 0.25, 0.2), theirs=(0.4, 0.25, 0.3)):
    measured = [_measured(OURS, ours), _measured(TIMM, theirs, candidate="eager")]
    return records(case, measured, RATES)


def test_ratios_and_shares_are_those_of_the_rounds():
    first, second = _found(_case())
    assert first["images_per_second"] == 40
    assert first["range"] == [32, 40]
    assert second["pairs"] == pytest.approx([2, 1, 1.5])
    assert second["ratio"] == pytest.approx([1.5, 1, 2])
    work, least = counts.total(
        counts.count_layers(get_variant("efficientnetv2-b0"), image_size=192),
        "train", dtype="float32", batch=8,
    )  # fmt: skip
    assert first["share_of_matmul"] == pytest.approx(40 * work / 1e11)
    assert first["share_of_copy"] == pytest.approx(40 * least / 1e10)


def test_the_table_says_what_was_compared():
    text = table(_case(), _found(_case()))
    assert "effv2_jax / timm = 1.50 (1.00 - 2.00), 3 pairs" in text
    assert "NOT in turns" not in text
    assert len({len(line) for line in text.splitlines()[1:4]}) == 1  # columns are aligned


def test_inference_and_training_are_one_row_of_the_csv(tmp_path):
    results = Results(None, tmp_path / "x.csv")
    results.add(_found(_case()))
    results.add(_found(_case(mode="infer")))
    with (tmp_path / "x.csv").open() as file:
        ours, theirs = csv.DictReader(file)
    assert (ours["framework"], theirs["framework"]) == ("effv2_jax", "timm")
    assert ours["infer_samples_per_sec"] == ours["train_samples_per_sec"] == "40.0"
    assert theirs["train_ratio"] == "1.5"
    memory = ("train_device_mib", "train_step_mib", "train_process_mib")
    assert [ours[name] for name in memory] == ["", "1", "3"]


@pytest.mark.parametrize(
    ("case", "contestants", "known"),
    [
        (_case(), [OURS, TIMM], True),
        (_case(), [OURS], True),
        (_case(dtype="bfloat16"), [OURS], False),
        (_case(cores=2), [OURS], False),
        (_case(recipe="official"), [OURS], False),
        (_case(), [_contestant("effv2_jax", lowering="plain")], False),
        (_case(), [OURS, _contestant("timm", compile="off")], False),
        (_case(), [OURS, _contestant("keras-tf", compile="auto")], False),
    ],
)
def test_only_what_was_measured_with_all_the_same_settings_is_not_repeated(
    tmp_path, case, contestants, known
):
    Results(tmp_path / "x.json", None).add(_found(_case()))
    resumed = Results(tmp_path / "x.json", None, resume=True)
    assert resumed.has(case, contestants) is known


def test_measuring_again_takes_the_place_of_what_was_there(tmp_path):
    results = Results(tmp_path / "x.json", None)
    results.add(_found(_case()))
    results.add(_found(_case(batch=16)))
    results.add(_found(_case(), theirs=(1, 1, 1)))
    kept = read(tmp_path / "x.json")["results"]
    assert [(r["framework"], r["batch"]) for r in kept] == [
        ("effv2_jax", 16),
        ("timm", 16),
        ("effv2_jax", 8),
        ("timm", 8),
    ]
    assert kept[-1]["images_per_second"] == 8


def test_the_way_to_compute_is_chosen_once_for_all_batch_sizes():
    results = Results(None, None)
    results.add(_found(_case()))
    assert results.candidate(_case(batch=16), "timm", TIMM.asked) == "eager"
    assert results.candidate(_case(image_size=300), "timm", TIMM.asked) is None
    assert results.candidate(_case(cores=2), "timm", TIMM.asked) is None
    assert results.candidate(_case(batch=16), "timm", {"compile": "on"}) is None


def test_settings_name_what_else_was_tried():
    (record,) = records(
        _case(), [_measured(TIMM, [1], tried={"eager": "1 ms", "compiled": "2 ms"})], RATES
    )
    assert settings(record) == "timm: torch 2; eager (tried: eager 1 ms; compiled 2 ms)"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"machines": [], "results": 1}', '{"machines": [], "results": [{}]}']
)
def test_a_file_that_holds_no_results_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="no results"):
        read(tmp_path / "x.json")
