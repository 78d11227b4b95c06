import gzip
import struct

import numpy as np
import pytest

from effv2_jax.data.sources import open_source
from effv2_jax.errors import UserError
from tests.data import pictures
from tests.data.pictures import data_config as _config
from tests.data.pictures import labels_of as _labels


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
