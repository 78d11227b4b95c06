"""--mode eval: any weights on any data set, and what it leaves behind."""

import csv
import json
import re

import pytest
from PIL import Image

from effv2_jax.convert.weights_file import read_info
from effv2_jax.data import imagenet
from effv2_jax.errors import UserError
from effv2_jax.training import evaluation, loop
from tests.data.pictures import class_folders
from tests.inference.networks import write_weights
from tests.training import tiny


def folder_config(directory, weights, **overrides):
    return tiny.tiny_config(
        **{
            "data.source": "folder",
            "data.dir": str(directory),
            "data.workers": 0,
            "eval.image_size": None,
            "eval.batch_size": 4,
            "init.weights": str(weights),
            **overrides,
        }
    )


@pytest.fixture
def photos(tmp_path):
    """Three classes, and no training split."""
    return class_folders(tmp_path / "photos" / "val", {"ant": 4, "bee": 3, "cat": 4}).parent


def test_evaluation_repeats_the_last_one_of_the_run(finished_run, capsys):
    results = loop.evaluate(tiny.tiny_config(), finished_run.workdir)
    assert results == pytest.approx(finished_run.results)
    printed = capsys.readouterr().out
    assert "checkpoint of step 24: 359 examples of digits at 24 px, 10 classes" in printed
    assert f"{results['top1']:.4%}" in printed
    assert "moving average" in printed
    report = json.loads((finished_run.workdir / "eval" / "eval.json").read_text())
    assert set(report["results"]) == {"raw weights", "moving average"}
    for name, key in (("raw weights", "top1"), ("moving average", "ema_top1")):
        assert report["results"][name]["top1"] == results[key]


def test_weights_of_a_run_say_what_their_logits_mean(finished_run):
    assert read_info(finished_run.workdir / "final.safetensors")["source"]["loss"] == "softmax"


def test_weights_are_evaluated_on_a_folder_that_has_nothing_to_train_on(photos, tmp_path, capsys):
    weights = write_weights(tmp_path / "w.safetensors")
    results = loop.evaluate(folder_config(photos, weights), tmp_path / "out")
    folder = tmp_path / "out" / "eval"
    assert sorted(p.name for p in folder.iterdir()) == [
        "confusion.png", "eval.json", "per_class.csv",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["eval"]

    report = json.loads((folder / "eval.json").read_text())
    result = report["results"]["weights"]
    assert report["labels"] == ["ant", "bee", "cat"]
    assert report["image_size"] == 24  # of the weights
    assert (result["examples"], result["top5_right"]) == (11, 11)
    assert results["top1"] == result["top1_right"] / 11
    assert [row["examples"] for row in result["classes"]] == [4, 3, 4]
    assert sum(times for _, _, times in result["confusions"]) == 11
    right = sum(times for label, best, times in result["confusions"] if label == best)
    assert right == result["top1_right"]

    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    assert [row["label"] for row in rows] == ["ant", "bee", "cat"]
    assert [int(row["right"]) for row in rows] == [row["right"] for row in result["classes"]]
    assert Image.open(folder / "confusion.png").width > 300

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[2:-1])) <= 80
    assert lines[-1] == f"written to {folder}: eval.json, per_class.csv, confusion.png"


@pytest.mark.parametrize(("batch_size", "devices"), [(7, 1), (64, 1), (4, 4), (64, 4)])
def test_all_counts_are_the_same_for_any_batch_and_number_of_devices(
    photos, tmp_path, batch_size, devices
):
    weights = write_weights(tmp_path / "w.safetensors")
    reports = []
    for size, count in ((1, 1), (batch_size, devices)):
        config = folder_config(
            photos, weights, **{"eval.batch_size": size, "runtime.devices": count}
        )
        loop.evaluate(config, tmp_path / f"{size}")
        reports.append(json.loads((tmp_path / f"{size}" / "eval" / "eval.json").read_text()))
    one, other = (report["results"]["weights"] for report in reports)
    for exact in ("top1_right", "top5_right", "classes", "confusions"):
        assert other[exact] == one[exact], exact
    assert [b["count"] for b in other["calibration"]] == [b["count"] for b in one["calibration"]]
    for rounded in ("loss", "ece"):  # sums in float32 and float64
        assert other[rounded] == pytest.approx(one[rounded], rel=1e-5), rounded


def test_classes_in_another_order_are_brought_together_by_their_names(photos, tmp_path):
    files = {}
    for name, labels in (("same", ("ant", "bee", "cat")), ("other", ("cat", "ant", "bee"))):
        files[name] = write_weights(tmp_path / f"{name}.safetensors", labels=labels)
    loop.evaluate(folder_config(photos, files["other"]), tmp_path / "out")
    result = json.loads((tmp_path / "out/eval/eval.json").read_text())["results"]["weights"]
    loop.evaluate(folder_config(photos, files["same"]), tmp_path / "out")
    same = json.loads((tmp_path / "out/eval/eval.json").read_text())["results"]["weights"]
    # The same outputs mean other classes: output 0 is "cat" (class 2), 1 "ant", 2 "bee".
    expected = sorted([label, (2, 0, 1)[best], times] for label, best, times in same["confusions"])
    assert result["confusions"] == expected


def test_names_that_have_nothing_in_common_are_told(photos, tmp_path, capsys):
    weights = write_weights(tmp_path / "w.safetensors", labels=("dog", "fox", "owl"))
    loop.evaluate(folder_config(photos, weights), tmp_path / "out")
    assert "class 0 is 'dog' for the weights and 'ant' in the data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("made", "asked", "says"),
    [
        ({"labels": ("a", "b")}, {}, "has 2 classes, the data set has 3"),
        ({"labels": ("a", "b", "c", "d")}, {}, "has 4 classes, the data set has 3"),
        ({"kind": "finetune"}, {}, "set --config.data.preprocessing=finetune"),
        ({}, {"eval.label_subset": "imagenet1k"}, "found 3 .* and 3: leave it out"),
        ({}, {"init.weights": ""}, "no checkpoint to evaluate"),
    ],
)
def test_weights_that_do_not_fit_the_data_are_refused(photos, tmp_path, made, asked, says):
    weights = write_weights(tmp_path / "w.safetensors", **made)
    with pytest.raises(UserError, match=says):
        loop.evaluate(folder_config(photos, weights, **asked), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_pictures_are_left_out_and_told(photos, tmp_path, capsys):
    (photos / "val" / "bee" / "001.png").write_text("no picture")
    weights = write_weights(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"001\.png: cannot decode"):
        loop.evaluate(folder_config(photos, weights), tmp_path / "out")
    config = folder_config(photos, weights, **{"data.on_corrupt": "skip"})
    loop.evaluate(config, tmp_path / "out")
    assert "broken pictures that were left out: 1\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/eval/eval.json").read_text())
    assert report["results"]["weights"]["examples"] == 10


def test_labels_subset_of_imagenet21k():
    """The networks are too large for a test: only what is chosen is looked at."""
    config = tiny.tiny_config(**{"eval.label_subset": "imagenet1k", "init.weights": "w"})

    class Sized:
        def __init__(self, num_classes):
            self.num_classes, self.label_names = num_classes, None

    subject = evaluation.Subject(
        name="w", model=Sized(21843), weights={}, titles={}, labels=None, kind=None, image_size=24,
        source=Sized(1000), mesh=None,
    )  # fmt: skip
    subset = evaluation._subset(config, subject)
    assert subset.shape == (1000,)
    assert subset.max() < 21843
    config.eval.label_subset = "none"
    with pytest.raises(UserError, match=r"set --config\.eval\.label_subset=imagenet1k"):
        evaluation._subset(config, subject)


@pytest.mark.parametrize(
    ("outputs", "subset", "classes"),
    [(1000, "none", 1000), (21843, "imagenet1k", 1000), (21843, "none", 21843)],
)
def test_a_few_folders_named_by_synsets_are_evaluated_among_all_classes_of_imagenet(
    tmp_path, capsys, outputs, subset, classes
):
    synsets = ("n01440764", "n02102040", "n03888257")  # of Imagenette
    photos = class_folders(tmp_path / "photos" / "val", dict.fromkeys(synsets, 2)).parent
    weights = write_weights(
        tmp_path / "w.safetensors", labels=imagenet.labels(outputs), outputs=outputs
    )
    config = folder_config(photos, weights, **{"eval.label_subset": subset})
    loop.evaluate(config, tmp_path / "out")
    report = json.loads((tmp_path / "out/eval/eval.json").read_text())
    rows = [row for row in report["results"]["weights"]["classes"] if row["examples"]]
    table = imagenet.synsets_1k() if classes == 1000 else imagenet.synsets_21k()
    assert [row["index"] for row in rows] == [table.index(synset) for synset in synsets]
    assert [report["labels"][row["index"]] for row in rows] == [
        "tench (n01440764)", "English springer (n02102040)", "parachute (n03888257)",
    ]  # fmt: skip
    assert len(report["labels"]) == report["num_classes"] == classes
    printed = capsys.readouterr().out
    assert f"{classes:,} classes" in printed
    assert f"{classes - 3:,} classes have no examples here" in printed
    assert "warning" not in printed
    assert re.search(r"^  English springer +2 ", printed, re.MULTILINE)  # not cut in its synset


def test_folders_of_which_one_is_no_synset_stay_a_data_set_of_their_own(tmp_path):
    photos = class_folders(tmp_path / "photos" / "val", {"n01440764": 2, "cat": 2}).parent
    weights = write_weights(tmp_path / "w.safetensors", labels=None, outputs=1000)
    with pytest.raises(UserError, match="has 1,000 classes, the data set has 2"):
        loop.evaluate(folder_config(photos, weights), tmp_path / "out")
