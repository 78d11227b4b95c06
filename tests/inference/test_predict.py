"""tools/predict.py: right numbers, readable text, one clear line for every mistake."""

import csv
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effv2_jax.convert.weights_file import load_weights
from effv2_jax.data import imagenet
from effv2_jax.data.decode import decode
from effv2_jax.data.kinds import get_kind
from effv2_jax.data.preprocess import evaluation_image
from effv2_jax.inference.predictions import Answer, Prediction, as_table, best_classes
from effv2_jax.inference.weights import Weights, open_for_use
from tests.data.pictures import encode, photograph, real_data, write_tree
from tests.inference.networks import SIZE, network, write_weights

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def predict(monkeypatch, capsys):
    """Runs the command; returns its exit code, standard output and standard error."""
    specification = importlib.util.spec_from_file_location("predict", TOOLS / "predict.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)

    def run(*arguments):
        arguments = [str(argument) for argument in arguments]
        code = tool.main([*arguments, "--no-tune"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def weights(tmp_path):
    return write_weights(tmp_path / "w.safetensors")


@pytest.fixture
def photos(tmp_path):
    """Five pictures of different shapes, two folders named like classes."""
    shapes = {"ant/2.png": (30, 40), "ant/10.png": (50, 20), "bee/1.png": (24, 24),
              "other/1.png": (33, 31), "other/2.png": (9, 70)}  # fmt: skip
    tree = {
        name: encode(photograph(*shape, seed=seed))
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return write_tree(tmp_path / "photos", tree)


def by_definition(weights, path):
    """The shares of the classes, in NumPy."""
    model, variables, _ = load_weights(weights)
    pixels = decode(Path(path).read_bytes(), name="")
    image = (evaluation_image(pixels, size=SIZE, kind=get_kind("v2")) - 128) / 128
    logits = np.asarray(model.apply(variables, image[None]), np.float64)[0]
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_probabilities_are_those_of_the_definition(predict, weights, photos, batch_size):
    code, out, err = predict(weights, photos, "--format", "json", "--batch-size", batch_size)
    assert code == 0, err
    document = json.loads(out)
    assert document["model"] == "testing"
    assert document["image_size"] == SIZE
    assert document["probability"] == "softmax"
    names = [Path(each["file"]).relative_to(photos).as_posix() for each in document["predictions"]]
    assert names == ["ant/2.png", "ant/10.png", "bee/1.png", "other/1.png", "other/2.png"]
    assert [p["truth"] for p in document["predictions"]] == ["ant", "ant", "bee", None, None]
    for each in document["predictions"]:
        expected = by_definition(weights, each["file"])
        for found, index in zip(each["top"], np.argsort(-expected), strict=True):
            assert found["class"] == index
            assert found["label"] == ("ant", "bee", "cat")[index]
            assert found["probability"] == pytest.approx(expected[index], rel=1e-4)


def test_csv_has_a_line_a_picture_and_answer(predict, weights, photos, tmp_path):
    out = tmp_path / "p.csv"
    code, printed, err = predict(weights, photos, "--format", "csv", "--top-k", 2, "--out", out)
    assert (code, printed) == (0, ""), err
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 10
    assert [row["rank"] for row in rows[:2]] == ["1", "2"]
    expected = by_definition(weights, photos / "ant" / "2.png")
    assert float(rows[0]["probability"]) == pytest.approx(expected.max(), rel=1e-4)
    assert rows[0]["label"] == ("ant", "bee", "cat")[expected.argmax()]


def test_table_and_summary(predict, weights, photos):
    code, out, err = predict(weights, photos / "ant", "--top-k", 1, photos / "other" / "1.png")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r" +\d+\.\d\d%  (ant|bee|cat)  .*2\.png  (right|wrong)", lines[0])
    assert lines[2].endswith("1.png")
    assert max(map(len, lines)) <= 80
    assert re.search(r"3 pictures, \d of 2 like their folder's name", err)


def test_table_keeps_to_its_width():
    answers = (Answer(0, "a" * 90, 0.9), Answer(1, "short", 0.1))
    predictions = [
        Prediction("folder/" * 20 + "1.jpg", answers, "b" * 90, 1),
        Prediction("2.jpg", answers),
    ]
    for width in (40, 80, 120):
        for some in (predictions, [Prediction(p.path, p.answers[:1]) for p in predictions]):
            lines = as_table(some, width=width).splitlines()
            assert max(map(len, lines)) <= width
            assert any("1.jpg" in line for line in lines)


def test_equal_probabilities_are_told_in_the_order_of_the_classes():
    assert best_classes(np.asarray([[0.2, 0.4, 0.4]]), 2).tolist() == [[1, 2]]
    assert best_classes(np.asarray([[0.5, 0.5]]), 5).tolist() == [[0, 1]]


def test_weights_without_names_tell_numbers(predict, tmp_path, photos):
    weights = write_weights(tmp_path / "w.safetensors", labels=None, outputs=3)
    code, out, _ = predict(weights, photos / "bee", "--format", "json", "--top-k", "1")
    assert code == 0
    (each,) = json.loads(out)["predictions"]
    assert each["top"][0]["label"] == str(each["top"][0]["class"])
    assert each["truth"] is None


def test_weights_trained_with_a_sigmoid_loss_give_each_class_its_own_share(tmp_path):
    weights = open_for_use(write_weights(tmp_path / "w.safetensors", loss="sigmoid"))
    logits = np.asarray([[0.0, 800.0, -800.0]], np.float32)
    assert weights.probabilities(logits).tolist() == [[0.5, 1.0, 0.0]]


def test_weights_that_do_not_tell_their_preprocessing_are_told_of(tmp_path, capsys):
    weights = open_for_use(write_weights(tmp_path / "w.safetensors", kind=None))
    assert weights.kind == get_kind("v2")
    assert "does not say how its images are made: v2" in capsys.readouterr().err


def test_subset_of_imagenet21k():
    subset = imagenet.subset_1k_of_21k()
    model, variables = network(3)
    weights = Weights(
        spec="", model=model, variables=variables, info={}, kind=get_kind("v2"), image_size=24,
        labels=imagenet.labels_1k(), subset=subset, sigmoid=False,
    )  # fmt: skip
    logits = np.zeros((1, imagenet.NUM_21K), np.float32)
    logits[0, subset[7]] = 3
    shares = weights.probabilities(logits)[0]
    assert shares.argmax() == 7
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_array_equal(shares == 0, subset < 0)
    assert weights.output(7) == subset[7]
    # Folders of ImageNet are named by their synsets.
    assert weights.folders["n01440764"] == 0
    assert weights.label(0) == "tench, Tinca tinca"


def test_broken_files_among_many_are_all_named(predict, weights, photos, tmp_path):
    write_tree(photos, {"bee/text.jpg": b"no picture", "bee/empty.jpg": b""})
    out = tmp_path / "p.json"
    out.write_text("old")
    arguments = (weights, photos, "--format", "json", "--out", out)
    code, _, err = predict(*arguments)
    assert code == 2
    message = err.splitlines()[-1]
    assert message.startswith("error: cannot decode 2 of 7 images: ")
    assert f"{photos}/bee/empty.jpg (the file" in message
    assert f"{photos}/bee/text.jpg (not an image file)" in message
    assert "--on-corrupt skip" in message
    assert out.read_text() == "old"

    code, _, err = predict(*arguments, "--on-corrupt", "skip")
    assert code == 0
    assert f"left out: {photos}/bee/text.jpg: not an image file\n" in err
    document = json.loads(out.read_text())
    assert len(document["predictions"]) == 5
    assert [Path(each["file"]).name for each in document["skipped"]] == ["empty.jpg", "text.jpg"]
    # Those behind the broken ones are still the ones they are.
    last = document["predictions"][-1]
    expected = by_definition(weights, last["file"])
    assert last["top"][0]["probability"] == pytest.approx(expected.max(), rel=1e-4)


def test_a_single_broken_file_is_named(predict, weights, photos):
    write_tree(photos, {"bee/empty.jpg": b""})
    code, _, err = predict(weights, photos)
    assert code == 2
    message = err.splitlines()[-1]
    assert message.startswith(f"error: {photos}/bee/empty.jpg: cannot decode this image (the file")


def test_pictures_of_all_predictions(predict, weights, photos, tmp_path):
    write_tree(photos, {"ant/deep/2.png": encode(photograph(20, 20, seed=9))})
    sheet, folder = tmp_path / "sheet.png", tmp_path / "cam"
    code, _, err = predict(
        weights, photos, "--contact-sheet", sheet, "--attribution", folder, "--layer", "features"
    )
    assert code == 0, err
    assert f"contact sheet of 6 pictures: {sheet}" in err
    assert Image.open(sheet).width > 500
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert found == ["ant/10.png.png", "ant/2.png.png", "ant/deep/2.png.png", "bee/1.png.png",
                     "other/1.png.png", "other/2.png.png"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{w}", "nothing.jpg"), "nothing.jpg: no such file or folder"),
        (("{w}", "{empty}"), "found no picture in this folder"),
        (("nothing.safetensors", "{p}"), "nothing.safetensors"),
        (("{p}/ant/2.png", "{p}"), "2.png"),
        (("{w}",), "required: IMAGE"),
        (("{w}", "{p}", "--topk", "3"), "unrecognized arguments: --topk"),
        (("{w}", "{p}", "--top", "3"), "unrecognized arguments: --top"),
        (("{w}", "{p}", "--top-k", "0"), "found '0', expected a whole number from 1 on"),
        (("{w}", "{p}", "--format", "xml"), "invalid choice: 'xml'"),
        (("{w}", "{p}", "--out", "{p}"), "is a folder; expected the name of a file to write"),
        (("{w}", "{p}", "--out", "no/p.csv"), "there is no folder"),
        (("{w}", "{p}", "--contact-sheet", "s.txt"), "expected a name ending in .png"),
        (("{w}", "{p}", "--attribution", "{w}"), "--attribution"),
        (("{w}", "{p}", "--attribution", "c", "--layer", "block_9"), "none of this name"),
        (("{w}", "{p}", "--labels-subset", "imagenet1k"), "has 3 classes; the subset imagenet1k"),
        (("{features}", "{p}"), "has no classifier"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    predict, weights, photos, tmp_path, monkeypatch, arguments, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"w": weights, "p": photos, "empty": tmp_path / "empty", "features": ""}
    if "{features}" in arguments:
        places["features"] = write_weights(tmp_path / "f.safetensors", labels=None, outputs=0)
    code, out, err = predict(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("tuning:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]


def test_names_come_from_standard_input(predict, weights, photos, monkeypatch):
    names = f"{photos}/bee/1.png\n{photos}/ant\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names)))
    code, out, _ = predict(weights, "-", "--format", "csv", "--top-k", "1")
    assert code == 0
    files = [Path(row["file"]).name for row in csv.DictReader(io.StringIO(out))]
    assert files == ["1.png", "2.png", "10.png"]


@pytest.mark.real_data
def test_awkward_files_are_predicted_and_broken_ones_named(predict, weights):
    folder = real_data() / "awkward"
    code, out, err = predict(weights, folder / "good", "--format", "json")
    assert code == 0, err
    found = {Path(p["file"]).name: p["top"] for p in json.loads(out)["predictions"]}
    assert len(found) == 21
    upright = found["exif_orientation_1.jpg"][0]["probability"]
    for number in range(2, 9):
        turned = found[f"exif_orientation_{number}.jpg"][0]["probability"]
        assert turned == pytest.approx(upright, abs=0.05)  # JPEG's losses depend on the position
    code, _, err = predict(weights, folder, "--on-corrupt", "skip", "--format", "json")
    assert code == 0
    assert err.count("left out: ") == 5
