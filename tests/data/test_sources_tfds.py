"""TFDS data sets are prepared here without TensorFlow: only decoding an image would need it."""

import importlib.util
import logging
import pickle
import shutil
import sys

import numpy as np
import pytest

from effv2_jax.config import base_config
from effv2_jax.data import sources_tfds
from effv2_jax.data.decode import decode
from effv2_jax.data.examples import Source
from effv2_jax.data.sources import open_source
from effv2_jax.errors import UserError
from tests.data import pictures

pytest.importorskip("array_record")


def _photo(number):
    return pictures.photograph(14, 10, seed=number)


def _prepare(data_dir, *, label, name="tiny_shapes"):
    import tensorflow_datasets as tfds

    def info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "file_name": tfds.features.Text(),
        }
        features.update(label(tfds))
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def examples(self, count):
        key = next(iter(label(tfds)))
        for i in range(count):
            yield (
                i,
                {
                    "image": pictures.encode(_photo(i)),
                    "file_name": f"{i}.png",
                    key: i % 3 if key == "label" else [i % 3, 2],
                },
            )

    members = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, manager: {
            "train": self._generate_examples(9),
            "test": self._generate_examples(4),
        },
        "_generate_examples": examples,
        "__module__": "__main__",  # TFDS looks for files beside any other module
    }
    camel = "".join(part.title() for part in name.split("_"))
    with tfds.core.registered.skip_registration():
        builder = type(camel, (tfds.core.GeneratorBasedBuilder,), members)
        tfds.disable_progress_bar()
        builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    _prepare(folder, label=lambda tfds: {"label": tfds.features.ClassLabel(names=list("abc"))})
    return folder


def _config(data_dir, name="tiny_shapes", **changes):
    data = base_config().data
    data.source, data.name, data.dir = "tfds", name, str(data_dir)
    data.update(changes)
    return data


def _contents(source):
    """The number of the photograph and the label of every example."""
    numbers = {_photo(i).tobytes(): i for i in range(9)}
    examples = [source[i] for i in range(len(source))]
    return sorted((numbers[decode(e.image, name=e.name).tobytes()], e.label) for e in examples)


def test_a_prepared_data_set_is_read_without_tensorflow(data_dir):
    source = open_source(_config(data_dir), "train")
    assert isinstance(source, Source)
    assert source.num_classes == 3
    assert source.label_names == ("a", "b", "c")
    assert not source.in_memory
    assert _contents(source) == [(i, i % 3) for i in range(9)]
    if importlib.util.find_spec("tensorflow") is None:
        assert "tensorflow" not in sys.modules
    assert source[0].name.startswith("tiny_shapes/train[0] (")


def test_split_expressions(data_dir):
    config = _config(data_dir, train_split="train[:67%]", eval_split="train[67%:]")
    train, evaluation = open_source(config, "train"), open_source(config, "eval")
    assert (len(train), len(evaluation)) == (6, 3)
    assert sorted(_contents(train) + _contents(evaluation)) == [(i, i % 3) for i in range(9)]


def test_the_source_survives_pickling(data_dir):
    source = open_source(_config(data_dir, eval_split="test"), "eval")
    copy = pickle.loads(pickle.dumps(source))
    assert _contents(copy) == _contents(source) == [(0, 0), (1, 1), (2, 2), (3, 0)]


def test_several_labels(tmp_path):
    _prepare(
        tmp_path,
        name="tiny_tags",
        label=lambda tfds: {
            "labels": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=4))
        },
    )
    source = open_source(_config(tmp_path, "tiny_tags", multilabel=True), "train")
    labels = {tuple(source[i].label) for i in range(len(source))}
    assert labels == {(1, 0, 1, 0), (0, 1, 1, 0), (0, 0, 1, 0)}
    assert source[0].label.dtype == np.float32
    with pytest.raises(UserError, match=r"found the labels \[.*\], expected exactly one"):
        open_source(_config(tmp_path, "tiny_tags"), "train")[0]


@pytest.mark.parametrize("split", ["validation", "train[:50"])
def test_a_split_that_does_not_exist_is_named_with_those_that_do(data_dir, split):
    with pytest.raises(UserError, match=r"^data.eval_split: .*it has train, test") as caught:
        open_source(_config(data_dir, eval_split=split), "eval")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_answered_with_similar_ones(data_dir):
    with pytest.raises(UserError, match=r"knows no data set 'imagnette'; similar.*imagenette"):
        open_source(_config(data_dir, "imagnette"), "train")
    with pytest.raises(UserError, match=r"data.name: found nothing"):
        open_source(_config(data_dir, ""), "train")


COMMAND = (
    r"python -c \"import tensorflow_datasets as tfds; tfds.builder\('cifar10', "
    r"data_dir='{}', file_format='array_record'\).download_and_prepare\(\)\""
)


def _tensorflow_is_installed(monkeypatch, answer):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        sources_tfds.importlib.util,
        "find_spec",
        lambda name, *rest: (answer or None) if name == "tensorflow" else find_spec(name, *rest),
    )


def test_without_tensorflow_an_unprepared_data_set_says_what_to_run(tmp_path, monkeypatch):
    _tensorflow_is_installed(monkeypatch, False)
    with pytest.raises(UserError, match=COMMAND.format(tmp_path)):
        open_source(_config(tmp_path, "cifar10"), "train")


def test_with_tensorflow_an_unprepared_data_set_is_prepared(tmp_path, data_dir, monkeypatch):
    import tensorflow_datasets as tfds

    _tensorflow_is_installed(monkeypatch, True)
    real = tfds.builder
    calls = []

    class Unprepared:
        def __init__(self, name, **arguments):
            self.name, self.arguments = name, arguments

        def is_prepared(self):
            return False

        def download_and_prepare(self):  # the data set appears where it was asked for
            shutil.copytree(data_dir / self.name, tmp_path / self.name)

        def __getattr__(self, attribute):
            return getattr(real(self.name, data_dir=self.arguments["data_dir"]), attribute)

    def builder(name, **arguments):
        calls.append(arguments)
        return Unprepared(name, **arguments)

    monkeypatch.setattr(tfds, "builder", builder)
    assert len(open_source(_config(tmp_path), "train")) == 9
    assert calls[-1] == {"data_dir": str(tmp_path), "file_format": "array_record"}


def test_another_file_format_is_explained(tmp_path, data_dir):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "tiny_shapes/1.0.0"
    description = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(description.replace("array_record", "tfrecord"))
    for path in folder.glob("*.array_record-*"):
        path.rename(folder / path.name.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"as tfrecord, expected array_record; prepare it in anot"):
        open_source(_config(tmp_path), "train")


def test_a_data_set_without_class_labels_is_explained(tmp_path):
    logging.getLogger("absl").setLevel(logging.ERROR)
    _prepare(tmp_path, name="tiny_numbers", label=lambda tfds: {"label": np.int64})
    with pytest.raises(UserError, match=r"the feature label of 'tiny_numbers' is no class label"):
        open_source(_config(tmp_path, "tiny_numbers"), "train")
