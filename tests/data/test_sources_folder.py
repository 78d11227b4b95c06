import pickle

import numpy as np
import pytest

from effv2_jax.data.examples import Source, held_out
from effv2_jax.data.sources import open_source
from effv2_jax.errors import UserError
from tests.data import pictures
from tests.data.pictures import data_config as _config
from tests.data.pictures import labels_of as _labels
from tests.data.pictures import names_of as _names


@pytest.fixture
def photos(tmp_path):
    """train/ and val/ with three classes."""
    return pictures.class_folders(
        tmp_path / "photos",
        {"train/cat": 3, "train/bird": 2, "train/dog": 4, "val/dog": 1, "val/cat": 2},
    )


def test_classes_are_numbered_in_sorted_order(photos):
    source = open_source(_config("folder", photos), "train")
    assert isinstance(source, Source)
    assert source.label_names == ("bird", "cat", "dog")
    assert source.num_classes == 3
    assert _labels(source) == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert source[2].name == str(photos / "train/cat/000.png")
    assert source[2].image == (photos / "train/cat/000.png").read_bytes()
    assert not source.in_memory


def test_evaluation_uses_the_training_classes_also_if_it_lacks_one(photos):
    # "validation", the default, also finds val/.
    source = open_source(_config("folder", photos), "eval")
    assert source.label_names == ("bird", "cat", "dog")
    assert _labels(source) == [1, 1, 2]
    assert _names(source)[2].endswith("val/dog/000.png")


def test_sources_survive_pickling(photos):
    source = open_source(_config("folder", photos), "train")
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert _names(copy) == _names(source)
    assert _labels(copy) == _labels(source)


def test_only_images_count_at_any_depth_and_hidden_files_do_not(tmp_path):
    image = pictures.encode(pictures.photograph())
    pictures.write_tree(
        tmp_path,
        {
            "train/a/deep/er/x.JPG": image,
            "train/a/with a space.jpeg": image,
            "train/a/.hidden.png": b"",
            "train/a/notes.txt": b"",
            "train/.cache/x.png": image,
            "train/b/x.png": image,
        },
    )
    source = open_source(_config("folder", tmp_path), "train")
    assert [name.split("/train/")[1] for name in _names(source)] == [
        "a/deep/er/x.JPG",
        "a/with a space.jpeg",
        "b/x.png",
    ]


@pytest.mark.parametrize("layout", ["single folder", "train without val"])
def test_a_fraction_of_every_class_is_held_out(tmp_path, layout):
    prefix = "" if layout == "single folder" else "train/"
    counts = {f"{prefix}a": 20, f"{prefix}b": 10, f"{prefix}c": 2}
    pictures.class_folders(tmp_path, counts)
    config = _config("folder", tmp_path, eval_fraction=0.2)
    train, evaluation = open_source(config, "train"), open_source(config, "eval")
    assert np.bincount(_labels(train)).tolist() == [16, 8, 1]
    assert np.bincount(_labels(evaluation)).tolist() == [4, 2, 1]
    assert not set(_names(train)) & set(_names(evaluation))
    assert _names(evaluation) == _names(open_source(config, "eval"))


def test_a_fraction_is_not_held_out_of_a_folder_that_has_a_split_for_evaluation_only(tmp_path):
    pictures.class_folders(tmp_path / "photos" / "val", {"a": 2, "b": 3})
    config = _config("folder", tmp_path / "photos", eval_fraction=0.2)
    evaluation = open_source(config, "eval")
    assert (evaluation.label_names, _labels(evaluation)) == (("a", "b"), [0, 0, 1, 1, 1])
    with pytest.raises(UserError, match=r"no folder 'train' in .* \(it has val\)"):
        open_source(config, "train")
    pictures.class_folders(tmp_path / "classes", {"val": 5, "key": 5})
    config = _config("folder", tmp_path / "classes", eval_fraction=0.2)
    assert open_source(config, "train").label_names == ("key", "val")


def test_a_class_of_one_is_trained_on():
    mask = held_out(np.array([0, 1, 1, 1, 1]), 0.5)
    assert not mask[0]
    assert mask[1:].sum() == 2


def test_official_lists_of_files(tmp_path):
    image = pictures.encode(pictures.photograph())
    pictures.write_tree(
        tmp_path / "images",
        {"pie/1.jpg": image, "pie/2.jpg": image, "soup/3.jpg": image, "flat/4.jpg": image},
    )
    (tmp_path / "train.txt").write_text("# official\npie/1\nsoup/3.jpg\n\n")
    (tmp_path / "test.txt").write_text("pie/2\nflat/4.jpg\tsoup\n")
    config = _config(
        "folder",
        tmp_path / "images",
        train_list=str(tmp_path / "train.txt"),
        eval_list=str(tmp_path / "test.txt"),
    )
    assert open_source(config, "train").label_names == ("pie", "soup")
    evaluation = open_source(config, "eval")
    assert _labels(evaluation) == [0, 1]
    assert _names(evaluation)[0].endswith("pie/2.jpg")


def test_lists_with_several_labels(tmp_path):
    image = pictures.encode(pictures.photograph())
    pictures.write_tree(tmp_path, {"1.png": image, "2.png": image})
    (tmp_path / "train.txt").write_text("1.png\tsea,sky\n2.png\tsky\n")
    (tmp_path / "test.txt").write_text("2.png\tsea\n")
    config = _config(
        "folder",
        tmp_path,
        multilabel=True,
        train_list=str(tmp_path / "train.txt"),
        eval_list=str(tmp_path / "test.txt"),
    )
    source = open_source(config, "train")
    assert source.label_names == ("sea", "sky")
    np.testing.assert_array_equal(np.stack(_labels(source)), [[1, 1], [0, 1]])
    assert source[0].label.dtype == np.float32


def test_all_mistakes_of_a_list_are_named_at_once(tmp_path):
    pictures.class_folders(tmp_path, {"a": 1})
    (tmp_path / "train.txt").write_text("a/000.png\n")
    (tmp_path / "test.txt").write_text("a/000.png\tzebra\na/lost.png\n")
    lists = {
        "train_list": str(tmp_path / "train.txt"),
        "eval_list": str(tmp_path / "test.txt"),
    }
    with pytest.raises(UserError, match=r"1 listed files are not in .*a/lost.png.*zebra"):
        open_source(_config("folder", tmp_path, **lists), "eval")
    with pytest.raises(UserError, match=r"only one of the two"):
        open_source(_config("folder", tmp_path, train_list=lists["train_list"]), "train")
    lists["train_list"] = str(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"none.txt: found no such list"):
        open_source(_config("folder", tmp_path, **lists), "train")


FOLDER_MISTAKES = {
    # files, changes, split, message
    "no folder": (None, {}, "train", r"data.dir: found no folder"),
    "nothing named": ({}, {"dir": ""}, "train", r"data.dir: found nothing"),
    "no class": ({"train/x.png": b""}, {}, "train", r"found no sub-folder"),
    "no image": ({"train/a/x.txt": b""}, {}, "train", r"found no image in its 1 sub-folders"),
    "empty class": (
        {"train/a/x.png": b"", "train/b/x.txt": b"", "train/c/x.txt": b""},
        {},
        "train",
        r"found no image in the class folders b, c;",
    ),
    "no train": (
        {"training/a/x.png": b""},
        {},
        "train",
        r"data.train_split: found no folder 'train' in .* \(it has training\)",
    ),
    "no val": (
        {"train/a/x.png": b"", "holdout/a/x.png": b""},
        {},
        "eval",
        r"data.eval_split: found no folder 'validation' in .* \(it has holdout, train\)",
    ),
    "new class in val": (
        {"train/a/x.png": b"", "val/a/x.png": b"", "val/z/x.png": b""},
        {},
        "eval",
        r"found classes that .*train does not have: z",
    ),
    "too few to hold out": (
        {"a/x.png": b"", "b/x.png": b""},
        {"eval_fraction": 0.1},
        "eval",
        r"one image per class leaves none to evaluate",
    ),
}


@pytest.mark.parametrize("mistake", FOLDER_MISTAKES)
def test_folder_mistakes_are_explained(tmp_path, mistake):
    files, changes, split, message = FOLDER_MISTAKES[mistake]
    root = tmp_path / "data"
    if files is not None:
        root.mkdir()
        pictures.write_tree(root, files)
    config = _config("folder", root)
    config.update(changes)
    with pytest.raises(UserError, match=message) as caught:
        open_source(config, split)
    assert "\n" not in str(caught.value)


def test_a_file_that_vanishes_is_named(photos):
    source = open_source(_config("folder", photos), "train")
    (photos / "train/bird/001.png").unlink()
    with pytest.raises(UserError, match=r"bird/001.png: cannot be read \(No such file"):
        source[1]


@pytest.mark.parametrize(("split", "directory"), [("validation", "."), (".", "val")])
def test_a_folder_to_evaluate_needs_no_training_images(tmp_path, split, directory):
    pictures.class_folders(tmp_path / "val", {"bee": 2, "ant": 1})
    data = pictures.data_config("folder", tmp_path / directory, eval_split=split)
    source = open_source(data, "eval")
    assert source.label_names == ("ant", "bee")
    assert pictures.labels_of(source) == [0, 1, 1]
    with pytest.raises(UserError, match=r"data\.train_split: found no folder 'train'"):
        open_source(data, "train")
