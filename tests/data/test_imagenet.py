"""The classes of ImageNet, against the lists that others publish."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from effv2_jax.data import imagenet

# n03931044 and n09859684 have no pictures; without them it is the published release of 21,841.
_NO_PICTURES = ("n03931044", "n09859684")


def test_the_1000_are_the_data_set_of_tensorflow_datasets():
    spec = importlib.util.find_spec("tensorflow_datasets")
    path = Path(spec.origin).parent / "datasets" / "imagenet2012" / "labels.txt"
    if not path.is_file():
        pytest.skip(f"this version of tensorflow_datasets has no {path}")
    assert list(imagenet.synsets_1k()) == path.read_text().split()


def test_names_of_known_classes():
    names = imagenet.labels_1k()
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert names[388] == "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca"
    assert names[850] == "teddy, teddy bear"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert names[134] == names[517] == "crane"  # the bird and the machine
    assert len(set(names)) == 999


def test_the_21843_are_sorted_synsets_with_the_two_that_have_no_pictures():
    synsets = imagenet.synsets_21k()
    assert len(synsets) == len(set(synsets)) == 21843
    assert list(synsets) == sorted(synsets)
    assert (synsets[0], synsets[-1]) == ("n00004475", "n15102894")
    assert [synsets.index(synset) for synset in _NO_PICTURES] == [9205, 15027]
    names = dict(zip(synsets, imagenet.labels_21k(), strict=True))
    assert names["n00004475"] == "organism, being"
    assert names["n02510455"].startswith("giant panda")
    assert names["n15102894"] == "knothole"
    assert all(name == name.strip() and name for name in names.values())


def test_the_subset_names_the_same_synsets_but_for_the_teddy():
    subset, synsets = imagenet.subset_1k_of_21k(), imagenet.synsets_21k()
    assert (subset.dtype, subset.shape) == (np.int32, (1000,))
    assert np.flatnonzero(subset < 0).tolist() == [850]
    for index, synset, name in zip(
        subset, imagenet.synsets_1k(), imagenet.labels_1k(), strict=True
    ):
        if index >= 0:
            assert synsets[index] == synset
            assert imagenet.labels_21k()[index] == name
    assert imagenet.synsets_1k()[850] == "n04399382"
    assert "n04399382" not in synsets


def test_logits_of_the_1000_never_favour_the_class_that_is_absent():
    logits = np.arange(2 * 21843, dtype=np.float32).reshape(2, 21843)
    taken = imagenet.logits_1k(logits)
    assert taken.shape == (2, 1000)
    assert taken.dtype == np.float32
    assert (taken[:, 850] == -np.inf).all()
    panda = imagenet.synsets_21k().index("n02510455")
    np.testing.assert_array_equal(taken[:, 388], logits[:, panda])


def test_labels_follow_the_number_of_outputs():
    assert imagenet.labels(1000) == imagenet.labels_1k()
    assert imagenet.labels(21843) == imagenet.labels_21k()
    assert imagenet.labels(10) is None


def test_synsets_are_made_readable_and_other_labels_left_alone():
    assert imagenet.readable("n01440764") == "tench (n01440764)"
    assert imagenet.readable("n04399382").startswith("teddy")  # of the 1,000 only
    for label in ("tench", "n1", "n99999999", ""):
        assert imagenet.readable(label) == label


@pytest.mark.parametrize("label", ["n02102040", "my dog", "crane (bird)", "(n02102040)", ""])
def test_a_synset_behind_a_name_is_taken_off_again(label):
    shown = imagenet.readable(label)
    expected = "English springer" if label == "n02102040" else label
    assert imagenet.without_synset(shown) == expected
