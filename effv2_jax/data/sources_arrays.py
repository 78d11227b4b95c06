"""Pictures that are arrays: idx and npz files, the embedded digits, synthetic ones."""

import gzip
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.data.examples import Example, held_out
from effv2_jax.errors import UserError

# The same split under the names that published files use.
_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "test", "t10k"),
    "val": ("val", "validation", "test", "t10k"),
    "test": ("test", "t10k"),
}
_DIGITS_EVAL_FRACTION = 0.2


class ArraySource:
    """Pictures in memory. See `Source`."""

    in_memory = True

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        num_classes: int,
        label_names: tuple[str, ...] | None,
        name: str,
    ) -> None:
        """Keeps the arrays.

        Args:
          images: uint8 [n, H, W], [n, H, W, 1] or [n, H, W, 3].
          labels: int32 [n], or multi-hot float32 [n, num_classes].
          num_classes: of the data set, also if this split lacks some.
          label_names: the classes in order, or None.
          name: what messages call the data set.
        """
        self._images, self._labels, self._name = images, labels, name
        self.num_classes, self.label_names = num_classes, label_names

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        label = self._labels[index]
        return Example(
            self._images[index],
            int(label) if self._labels.ndim == 1 else label,
            f"{self._name}[{index}]",
        )


def open_digits(split: str) -> ArraySource:
    """The handwritten digits of scikit-learn's `load_digits`: 1,797 grey pictures of 8x8.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (test part), UCI
    Machine Learning Repository, 1998, CC BY 4.0, https://doi.org/10.24432/C50P49. Pixels 0..16
    are scaled to 0..255. A fifth of every class is held out for evaluation.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        images, labels = archive["images"], archive["labels"].astype(np.int32)
    images = np.rint(images * (255 / 16)).astype(np.uint8)
    chosen = held_out(labels, _DIGITS_EVAL_FRACTION)
    if split == "train":
        chosen = ~chosen
    names = tuple(str(digit) for digit in range(10))
    return ArraySource(
        images[chosen], labels[chosen], num_classes=10, label_names=names, name=f"digits/{split}"
    )


class SyntheticSource:
    """Made-up pictures: noise over a tint and stripes that tell the class. See `Source`.

    A picture is a function of its index; nothing is stored.
    """

    in_memory = True
    label_names = None

    def __init__(self, length: int, *, num_classes: int, size: int, first: int) -> None:
        """Describes the data set.

        Args:
          length: number of examples.
          num_classes: of the data set.
          size: pixels per side.
          first: index of the first picture in the endless series; splits must not overlap.
        """
        self._length, self._size, self._first = length, size, first
        self.num_classes = num_classes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = self._first + index
        rng = np.random.Generator(np.random.Philox(key=[0, number]))
        label = int(rng.integers(self.num_classes))
        style = np.random.Generator(np.random.Philox(key=[1, label]))
        tint = style.uniform(64, 192, size=3)
        angle, waves = style.uniform(0, math.pi), style.uniform(2, 8)
        grid = np.linspace(0, 2 * math.pi * waves, self._size)
        phase = rng.uniform(0, 2 * math.pi)
        stripes = np.sin(grid[:, None] * math.sin(angle) + grid * math.cos(angle) + phase)
        noise = rng.normal(0, 20, size=(self._size, self._size, 3))
        image = np.clip(tint + 40 * stripes[:, :, None] + noise, 0, 255).astype(np.uint8)
        return Example(image, label, f"synthetic[{number}]")


def open_synthetic(data_config: Any, split: str) -> SyntheticSource:
    """Synthetic pictures: `data.num_examples` to train on, a quarter as many to evaluate.

    `data.name` may say how many classes and pixels: "10x64" (the default) is ten classes of
    64x64 pictures.

    Raises:
      UserError: `data.name` is not of that form.
    """
    text = data_config.name or "10x64"
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"data.name: found {text!r}, expected CLASSESxPIXELS, for example 10x64")
    classes, size = int(parts[0]), int(parts[1])
    train = int(data_config.num_examples)
    if split == "train":
        return SyntheticSource(train, num_classes=classes, size=size, first=0)
    return SyntheticSource(max(train // 4, 1), num_classes=classes, size=size, first=train)


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file of unsigned bytes, gzipped or not (the format of MNIST).

    Returns:
      uint8, of the shape that the header says.

    Raises:
      UserError: it is not such a file, or is damaged.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8:
        raise UserError(f"{path}: found no idx header, expected an idx-ubyte file")
    rank = data[3]
    if len(data) < 4 + 4 * rank:
        raise UserError(f"{path}: found a cut idx header; download the file again")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    if len(data) - 4 - 4 * rank != math.prod(shape):
        raise UserError(
            f"{path}: found {len(data) - 4 - 4 * rank} bytes of data, expected "
            f"{math.prod(shape)} for the shape {list(shape)}; download the file again"
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _load_idx(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All splits of a folder with <split>-images-idx3-ubyte[.gz] and -labels-idx1-ubyte[.gz]."""
    splits = {}
    for path in sorted(root.glob("*-images-idx*-ubyte*")):
        split = path.name.split("-images-")[0]
        labels = sorted(root.glob(f"{split}-labels-idx1-ubyte*"))
        if not labels:
            raise UserError(f"{path}: found no {split}-labels-idx1-ubyte[.gz] beside it")
        splits[split] = (read_idx(path), read_idx(labels[0]))
    return splits


def _load_npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The splits of an npz file: x_<split>, y_<split>; or images, labels of one split."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected an npz file") from error
    splits = {}
    for key in arrays:
        if key.startswith("x_") and f"y_{key[2:]}" in arrays:
            splits[key[2:]] = (arrays[key], arrays[f"y_{key[2:]}"])
    if "images" in arrays and "labels" in arrays:
        splits[path.stem] = (arrays["images"], arrays["labels"])
    if not splits:
        raise UserError(
            f"{path}: found the arrays {', '.join(sorted(arrays))}; expected images and labels, "
            f"or x_train, y_train, x_test, y_test"
        )
    return splits


def _label_names(root: Path) -> tuple[str, ...] | None:
    path = (root if root.is_dir() else root.parent) / "label_names.txt"
    if not path.is_file():
        return None
    return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())


def _checked_labels(labels: np.ndarray, *, multilabel: bool, count: int, name: str) -> np.ndarray:
    if multilabel:
        if labels.ndim != 2 or len(labels) != count:
            raise UserError(
                f"{name}: found labels {list(labels.shape)}, expected multi-hot rows "
                f"[{count}, classes] (data.multilabel)"
            )
        return labels.astype(np.float32)
    labels = labels.reshape(len(labels), -1)
    if labels.shape != (count, 1) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{name}: found labels {labels.dtype}{list(labels.shape)}, expected integers [{count}]"
        )
    return labels[:, 0].astype(np.int32)


def open_arrays(data_config: Any, split: str) -> ArraySource:
    """Opens idx or npz arrays; `data.dir` is the folder, or one npz file.

    A folder has either idx files under their published names (train-images-idx3-ubyte.gz, ...,
    t10k-labels-idx1-ubyte.gz) or one npz per split. "validation", "test" and "t10k" are found
    under each other's names. With one split only, `data.eval_fraction` of it is held out. A file
    label_names.txt beside the data, one name a line, is optional.

    Raises:
      UserError: files, splits or labels are missing or do not fit together.
    """
    if not data_config.dir:
        raise UserError("data.dir: found nothing, expected a folder of idx or npz files")
    root = Path(data_config.dir).expanduser()
    if root.is_file():
        splits = _load_npz(root)
    elif root.is_dir():
        splits = _load_idx(root)
        for path in sorted(root.glob("*.npz")):
            splits.update(_load_npz(path))
    else:
        raise UserError(f"data.dir: found no {root}; expected a folder of idx or npz files")
    if not splits:
        raise UserError(
            f"{root}: found neither idx files (train-images-idx3-ubyte.gz, ...) nor npz files"
        )
    wanted = {"train": data_config.train_split, "eval": data_config.eval_split}
    names = {
        part: next((n for n in _ALIASES.get(want, (want,)) if n in splits), None)
        for part, want in wanted.items()
    }
    hold_out = names["eval"] is None and data_config.eval_fraction > 0
    for part in {"train", split}:  # the classes are counted over the training labels
        if names[part] is None and not (part == "eval" and hold_out):
            raise UserError(
                f"data.{part}_split: found no {wanted[part]!r} in {root} (it has "
                f"{', '.join(sorted(splits))}); name one of these"
                + ("" if part == "train" else ", or set data.eval_fraction")
            )
    name = names["train"] if hold_out else names[split]
    images, labels = splits[name]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0:
        raise UserError(
            f"{root}: found images {images.dtype}{list(images.shape)} in {name!r}, expected uint8 "
            f"[n, H, W], [n, H, W, 1] or [n, H, W, 3]"
        )
    multilabel = bool(data_config.multilabel)
    labels = _checked_labels(
        labels, multilabel=multilabel, count=len(images), name=f"{root} {name!r}"
    )
    training = np.asarray(splits[names["train"]][1])
    num_classes = training.shape[1] if multilabel else int(training.max()) + 1
    if not multilabel and (labels.min() < 0 or labels.max() >= num_classes):
        raise UserError(
            f"{root}: found labels {labels.min()}..{labels.max()} in {name!r}, expected 0.."
            f"{num_classes - 1} as in {names['train']!r}"
        )
    if hold_out:
        chosen = held_out(
            labels if not multilabel else np.zeros(len(labels), int), data_config.eval_fraction
        )
        chosen = ~chosen if split == "train" else chosen
        images, labels = images[chosen], labels[chosen]
    label_names = _label_names(root)
    if label_names is not None and len(label_names) != num_classes:
        raise UserError(
            f"{root}: found {len(label_names)} names in label_names.txt, expected {num_classes}"
        )
    return ArraySource(
        images, labels, num_classes=num_classes, label_names=label_names, name=f"{root}/{name}"
    )
