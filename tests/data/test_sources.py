import numpy as np
import pytest

from effv2_jax.data.decode import decode
from effv2_jax.data.sources import open_source
from effv2_jax.errors import UserError
from tests.data import pictures
from tests.data.pictures import data_config as _config
from tests.data.pictures import labels_of as _labels


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
