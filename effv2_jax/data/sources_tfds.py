"""TensorFlow Datasets by name, read from ArrayRecord files without TensorFlow.

A data set must be prepared once in the ArrayRecord format. That step needs TensorFlow; it may
happen on another machine. Reading needs only `tensorflow_datasets` (for the description of the
data set and for split expressions such as "train[:90%]") and `array_record`.
"""

import contextlib
import difflib
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.data.examples import Example
from effv2_jax.errors import UserError

_LABEL_KEYS = ("label", "labels")
_NAME_KEYS = ("file_name", "image/filename", "filename", "id")
_DEFAULT_DIR = "~/tensorflow_datasets"  # where TFDS itself looks


class TfdsSource:
    """Serialised examples in ArrayRecord files. See `Source`."""

    in_memory = False

    def __init__(
        self,
        records: Any,
        *,
        label_key: str,
        num_classes: int,
        label_names: tuple[str, ...] | None,
        multilabel: bool,
        name: str,
    ) -> None:
        """Keeps the reader.

        Args:
          records: `array_record` data source: random access to bytes, picklable.
          label_key: of the label in an example.
          num_classes: of the label.
          label_names: the classes in order, or None.
          multilabel: labels become multi-hot vectors.
          name: what messages call the data set.
        """
        self._records, self._label_key = records, label_key
        self._multilabel, self._name = multilabel, name
        self.num_classes, self.label_names = num_classes, label_names

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        # The module comes with TFDS; it is the wire format of tf.train.Example.
        from tensorflow_datasets.proto import tf_example_pb2

        feature = tf_example_pb2.Example.FromString(self._records[index]).features.feature
        name = f"{self._name}[{index}]"
        for key in _NAME_KEYS:
            if key in feature and feature[key].bytes_list.value:
                name += f" ({feature[key].bytes_list.value[0].decode('utf-8', 'replace')})"
                break
        values = feature[self._label_key].int64_list.value
        if self._multilabel:
            label = np.zeros(self.num_classes, np.float32)
            label[list(values)] = 1
        elif len(values) != 1 or values[0] < 0:
            raise UserError(f"{name}: found the labels {list(values)}, expected exactly one")
        else:
            label = values[0]
        return Example(feature["image"].bytes_list.value[0], label, name)


def _prepare_command(name: str, data_dir: str) -> str:
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
        '.download_and_prepare()"'
    )


@contextlib.contextmanager
def _user_errors(what: str) -> Iterator[None]:
    """Turns what TFDS complains about into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # TFDS raises whatever the data set's code raises
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps warnings of TFDS off the terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _prepared_builder(name: str, data_dir: str) -> Any:
    """The TFDS builder of a data set that is prepared as ArrayRecord, prepared here if possible."""
    import tensorflow_datasets as tfds

    command = _prepare_command(name, data_dir)
    with _user_errors(f"data.name: cannot open the TFDS data set {name!r}"):
        try:
            with _quiet():  # an empty folder is told below, as an error
                builder = tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError as error:
            # The names are read from the message: TFDS lists them only with TensorFlow.
            known = re.findall(r"^\s*- (\w+)", str(error), re.MULTILINE)
            near = difflib.get_close_matches(re.split("[/:]", name)[0], known, n=3)
            hint = f"; similar names: {', '.join(near)}" if near else ""
            raise UserError(f"data.name: TFDS knows no data set {name!r}{hint}") from None
        prepared = builder.is_prepared()
    if not prepared:
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                f"data.dir: the TFDS data set {name!r} is not prepared in {data_dir}, which needs "
                f"TensorFlow once; where `pip install tensorflow tensorflow-datasets` was done, "
                f"run: {command}"
            )
        with _user_errors(f"data.name: preparing {name!r} in {data_dir} failed (`{command}`)"):
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
    formats = {str(getattr(f, "value", f)) for f in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"data.dir: the TFDS data set {name!r} is prepared in {builder.data_dir} as "
            f"{', '.join(sorted(formats))}, expected array_record; prepare it in another folder, "
            f"where TensorFlow is installed: {_prepare_command(name, data_dir + '_array_record')}"
        )
    return builder


def open_tfds(data_config: Any, split: str) -> TfdsSource:
    """Opens a split of a TFDS data set.

    `data.name` is the TFDS name ("imagenette/320px-v2", "cifar10:3.0.2"), `data.dir` the data_dir
    (empty: ~/tensorflow_datasets), `data.train_split` and `data.eval_split` split expressions. If
    the data set is not prepared and TensorFlow is installed, it is downloaded and prepared.

    Args:
      data_config: the section `data` of a config.
      split: "train" or "eval".

    Raises:
      UserError: no such data set or split; not prepared (with the command that prepares it);
        without a feature `image` or `label`.
    """
    if not data_config.name:
        raise UserError("data.name: found nothing, expected a TFDS name, for example cifar10")
    if importlib.util.find_spec("array_record") is None:
        raise UserError(
            "data.source: tfds needs the package array-record, which has no wheels for this "
            "system; use data.source=folder or arrays"
        )
    import tensorflow_datasets as tfds

    data_dir = str(Path(data_config.dir or _DEFAULT_DIR).expanduser())
    builder = _prepared_builder(data_config.name, data_dir)
    expression = data_config.train_split if split == "train" else data_config.eval_split
    what = (
        f"data.{split}_split: cannot read {expression!r} of {data_config.name!r} (it has "
        f"{', '.join(builder.info.splits)})"
    )
    with _user_errors(what):
        data_source = builder.as_data_source(
            split=expression,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format="array_record",
        )
    if len(data_source) == 0:
        raise UserError(f"{what}: it is empty")
    features = builder.info.features
    label_key = next((key for key in _LABEL_KEYS if key in features), None)
    if "image" not in features or label_key is None:
        raise UserError(
            f"data.name: {data_config.name!r} has the features {', '.join(features)}; expected "
            f"image and label (or labels)"
        )
    feature = features[label_key]
    feature = getattr(feature, "feature", feature)  # a sequence of labels
    if not hasattr(feature, "num_classes"):
        raise UserError(
            f"data.name: the feature {label_key} of {data_config.name!r} is no class label"
        )
    names = tuple(feature.names) if feature.names else None
    return TfdsSource(
        data_source.data_source,
        label_key=label_key,
        num_classes=feature.num_classes,
        label_names=names,
        multilabel=bool(data_config.multilabel),
        name=f"{data_config.name}/{expression}",
    )
