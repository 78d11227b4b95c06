import gzip
import pickle
import struct

import numpy as np
import pytest

from effv2_jax.config import base_config
from effv2_jax.data.decode import decode
from effv2_jax.data.sources import Source, held_out, open_source
from effv2_jax.errors import UserError
from tests.data import pictures


def _config(source, directory="", **changes):
    data = base_config().data
    data.source, data.dir = source, str(directory)
    data.update(changes)
    return data


def _names(source):
    return [source[i].name for i in range(len(source))]


def _labels(source):
    return [source[i].label for i in range(len(source))]


# --- folders -----------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """train/ and val/ with three classes."""
    return pictures.class_folders(
        tmp_path / "photos",
        {"train/cat": 3, "train/bird": 2, "train/dog": 4, "val/bird": 1, "val/cat": 2},
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
    assert _labels(source) == [0, 1, 1]
    assert _names(source)[1].endswith("val/cat/000.png")


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


# --- arrays ------------------------------------------------------------------------------------


def _idx(array):
    shape = array.shape
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.tobytes()


def _fashion(root, *, compress=True, train=12, test=5):
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 4).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = root / f"{split}-{name}-ubyte"
            data = _idx(array)
            if compress:
                path, data = path.with_name(path.name + ".gz"), gzip.compress(data)
            path.write_bytes(data)
    return root


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("eval_split", ["validation", "test", "t10k"])
def test_idx_files_as_published(tmp_path, compress, eval_split):
    root = _fashion(tmp_path / "fashion", compress=compress)
    config = _config("arrays", root, eval_split=eval_split)
    train, evaluation = open_source(config, "train"), open_source(config, "eval")
    assert (len(train), len(evaluation)) == (12, 5)
    assert train.num_classes == evaluation.num_classes == 4
    assert evaluation[4].label == 0
    assert train[0].image.shape == (28, 28)
    assert train.in_memory
    assert train.label_names is None


def test_names_of_classes_beside_arrays(tmp_path):
    root = _fashion(tmp_path / "fashion")
    (root / "label_names.txt").write_text("shirt\ntrouser\nbag\nboot\n")
    names = open_source(_config("arrays", root), "train").label_names
    assert names == ("shirt", "trouser", "bag", "boot")
    (root / "label_names.txt").write_text("shirt\n")
    with pytest.raises(UserError, match=r"found 1 names in label_names.txt, expected 4"):
        open_source(_config("arrays", root), "train")


def test_npz_in_both_forms(tmp_path):
    images = np.stack([pictures.photograph(8, 6, seed=i) for i in range(6)])
    labels = np.array([0, 1, 2, 0, 1, 2])
    one = tmp_path / "all.npz"
    np.savez(one, x_train=images, y_train=labels[:, None], x_test=images[:2], y_test=labels[:2])
    assert len(open_source(_config("arrays", one), "train")) == 6
    assert len(open_source(_config("arrays", one), "eval")) == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "train.npz", images=images, labels=labels)
    np.savez(folder / "holdout.npz", images=images[:3], labels=labels[:3])
    source = open_source(_config("arrays", folder, eval_split="holdout"), "eval")
    assert _labels(source) == [0, 1, 2]
    np.testing.assert_array_equal(source[1].image, images[1])


def test_arrays_hold_out_a_fraction(tmp_path):
    images = np.zeros((20, 4, 4), np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(20) % 2)
    config = _config("arrays", tmp_path, eval_fraction=0.25)
    sizes = [len(open_source(config, split)) for split in ("train", "eval")]
    assert sizes == [16, 4]  # a quarter of each class of ten, rounded to even


def test_multi_hot_arrays(tmp_path):
    labels = np.array([[1, 0, 1], [0, 0, 0]], np.uint8)
    np.savez(tmp_path / "train.npz", images=np.zeros((2, 4, 4), np.uint8), labels=labels)
    source = open_source(_config("arrays", tmp_path, multilabel=True), "train")
    assert source.num_classes == 3
    np.testing.assert_array_equal(np.stack(_labels(source)), labels)
    with pytest.raises(UserError, match=r"found labels uint8\[2, 3\], expected integers \[2\]"):
        open_source(_config("arrays", tmp_path), "train")


def _cut(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5]))


ARRAY_MISTAKES = {
    "cut file": (
        lambda root: _cut(root / "train-images-idx3-ubyte.gz"),
        r"train-images-idx3-ubyte.gz: found 9403 bytes of data, expected 9408",
    ),
    "cut gzip": (
        lambda root: (root / "train-images-idx3-ubyte.gz").write_bytes(
            (root / "train-images-idx3-ubyte.gz").read_bytes()[:99]
        ),
        r"train-images-idx3-ubyte.gz: cannot be read",
    ),
    "not idx": (
        lambda root: (root / "train-images-idx3-ubyte.gz").write_bytes(b"<html>"),
        r"train-images-idx3-ubyte.gz: found no idx header",
    ),
    "no labels": (
        lambda root: (root / "train-labels-idx1-ubyte.gz").unlink(),
        r"found no train-labels-idx1-ubyte",
    ),
    "labels of another length": (
        lambda root: (root / "train-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(_idx(np.zeros(3, np.uint8)))
        ),
        r"found labels uint8\[3, 1\], expected integers \[12\]",
    ),
    "no split": (
        lambda root: [path.unlink() for path in root.glob("train*")],
        r"data.train_split: found no 'train' in .* \(it has t10k\)",
    ),
    "empty folder": (
        lambda root: [path.unlink() for path in root.iterdir()],
        r"found neither idx files",
    ),
    "no folder": (
        lambda root: ([path.unlink() for path in root.iterdir()], root.rmdir()),
        r"data.dir: found no ",
    ),
}


@pytest.mark.parametrize("mistake", ARRAY_MISTAKES)
def test_array_mistakes_are_explained(tmp_path, mistake):
    root = _fashion(tmp_path / "fashion")
    damage, message = ARRAY_MISTAKES[mistake]
    damage(root)
    with pytest.raises(UserError, match=message) as caught:
        open_source(_config("arrays", root), "train")
    assert "\n" not in str(caught.value)


def test_npz_mistakes_are_explained(tmp_path):
    (tmp_path / "train.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"train.npz: cannot be read"):
        open_source(_config("arrays", tmp_path), "train")
    np.savez(tmp_path / "train.npz", pictures=np.zeros(3))
    with pytest.raises(UserError, match=r"found the arrays pictures; expected images and labels"):
        open_source(_config("arrays", tmp_path), "train")
    np.savez(tmp_path / "train.npz", images=np.zeros((3, 4, 4)), labels=np.arange(3))
    with pytest.raises(UserError, match=r"found images float64\[3, 4, 4\]"):
        open_source(_config("arrays", tmp_path), "train")


# --- embedded and made up ----------------------------------------------------------------------


def test_digits_are_embedded():
    config = _config("digits")
    train, evaluation = open_source(config, "train"), open_source(config, "eval")
    assert len(train) + len(evaluation) == 1797
    assert 350 <= len(evaluation) <= 370
    assert train.label_names == tuple("0123456789")
    images = np.stack([train[i].image for i in range(len(train))])
    assert images.dtype == np.uint8
    assert images.shape[1:] == (8, 8)
    assert (images.min(), images.max()) == (0, 255)
    # Every class is in both splits in the same share.
    shares = np.bincount(_labels(evaluation)) / np.bincount(_labels(train))
    assert shares.min() > 0.24
    assert shares.max() < 0.26


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    official = datasets.load_digits()
    config = _config("digits")
    ours = [open_source(config, split) for split in ("train", "eval")]
    pairs = {(s[i].image.tobytes(), s[i].label) for s in ours for i in range(len(s))}
    expected = np.rint(official.images * 255 / 16).astype(np.uint8)
    labels = official.target.tolist()
    assert pairs == {(e.tobytes(), t) for e, t in zip(expected, labels, strict=True)}


def test_synthetic_pictures_are_a_function_of_their_index():
    config = _config("synthetic", name="7x24", num_examples=40)
    train, evaluation = open_source(config, "train"), open_source(config, "eval")
    assert (len(train), len(evaluation), train.num_classes) == (40, 10, 7)
    assert train[3].image.shape == (24, 24, 3)
    np.testing.assert_array_equal(train[3].image, open_source(config, "train")[3].image)
    assert all(0 <= label < 7 for label in _labels(train))
    train_images = {train[i].image.tobytes() for i in range(40)}
    assert len(train_images) == 40
    assert not train_images & {evaluation[i].image.tobytes() for i in range(10)}


def test_synthetic_labels_can_be_learnt():
    config = _config("synthetic", name="4x16", num_examples=200)
    train, evaluation = open_source(config, "train"), open_source(config, "eval")

    def features(source):
        return np.stack([source[i].image.mean(axis=(0, 1)) for i in range(len(source))])

    labels = np.array(_labels(train))
    centres = np.stack([features(train)[labels == k].mean(axis=0) for k in range(4)])
    distance = np.linalg.norm(features(evaluation)[:, None] - centres, axis=2)
    assert (distance.argmin(axis=1) == _labels(evaluation)).mean() > 0.9


def test_a_malformed_synthetic_name_is_explained():
    with pytest.raises(UserError, match=r"data.name: found 'ten', expected CLASSESxPIXELS"):
        open_source(_config("synthetic", name="ten"), "train")


def test_an_unknown_source_is_refused():
    with pytest.raises(UserError, match=r"data.source: found 'web', expected one of tfds, folder"):
        open_source(_config("web"), "train")


# --- real data ---------------------------------------------------------------------------------


@pytest.mark.real_data
def test_real_folders_and_arrays():
    root = pictures.real_data()
    imagenette = _config("folder", root / "imagenette", eval_split="val")
    assert len(open_source(imagenette, "train")) == 9469
    evaluation = open_source(imagenette, "eval")
    assert len(evaluation) == 3925
    assert np.bincount(_labels(evaluation)).tolist() == [
        387, 395, 357, 386, 409, 394, 389, 419, 399, 390,
    ]  # fmt: skip
    example = evaluation[17]
    assert decode(example.image, name=example.name).shape == (128, 128, 3)
    fashion = _config("arrays", root / "fashion_mnist")
    train = open_source(fashion, "train")
    assert np.bincount(_labels(train)).tolist() == [
        747, 860, 809, 807, 763, 795, 807, 818, 792, 802,
    ]  # fmt: skip
    assert len(open_source(fashion, "eval")) == 2000
