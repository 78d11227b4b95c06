"""A folder of photographs: one sub-folder per class, or official lists of files.

Four layouts:

    DIR/train/<class>/...  DIR/val/<class>/...     data.train_split, data.eval_split
    DIR/<class>/...                                data.eval_fraction > 0: that share held out
    DIR/val/<class>/...                            evaluation only (--mode eval); with
                                                   data.eval_split="." DIR/<class>/...
    DIR/...  with lists                            data.train_list, data.eval_list

The class index is the position of the class in sorted order of the training classes.
A list has one file per line, relative to DIR (an extension may be missing, as in Food-101's lists);
the class is the folder that holds the file, or what stands behind a tab: one class, or with
data.multilabel several separated by commas. Empty lines and lines that begin with # are skipped.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.data.examples import Example, held_out
from effv2_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Spellings of the same split; the first that exists is taken.
_ALIASES = {"validation": ("val", "valid"), "val": ("validation", "valid")}


class FolderSource:
    """Files on disk, read when asked for. See `Source`."""

    in_memory = False

    def __init__(
        self,
        root: str,
        *,
        paths: list[str],
        labels: np.ndarray,
        label_names: tuple[str, ...],
    ) -> None:
        """Keeps the list.

        Args:
          root: folder that the paths are relative to.
          paths: [n] relative paths.
          labels: int32 [n], or multi-hot float32 [n, num_classes].
          label_names: the classes in order.
        """
        self._root, self._labels = root, labels
        # One string instead of a million: pickled to every worker process. No path holds a NUL.
        self._joined = "\0".join(paths)
        self._paths: list[str] | None = None
        self._length = len(paths)
        self.label_names = label_names
        self.num_classes = len(label_names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_paths": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if self._paths is None:
            self._paths = self._joined.split("\0")
        path = os.path.join(self._root, self._paths[index])
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from error
        label = self._labels[index]
        return Example(data, int(label) if self._labels.ndim == 1 else label, path)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def find_images(folder: str | Path) -> list[str]:
    """Images below a folder at any depth, hidden ones left out: sorted, relative to it."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(parent, name), folder))
    return sorted(found)


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 8 else shown or "nothing"


def _scan(folder: Path, classes: list[str]) -> tuple[list[str], np.ndarray]:
    """All images of a folder of classes: ([class/file], int32 [n]).

    Raises:
      UserError: a class without images, all named together.
    """
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for index, name in enumerate(classes):
        files = find_images(folder / name)
        if not files:
            empty.append(name)
        paths.extend(os.path.join(name, file) for file in files)
        labels.extend([index] * len(files))
    if not paths:
        raise UserError(
            f"{folder}: found no image in its {len(classes)} sub-folders, expected files ending "
            f"in {' '.join(EXTENSIONS)}"
        )
    if empty:
        raise UserError(
            f"{folder}: found no image in the class folders {_listing(empty)}; add images or "
            f"remove the folders"
        )
    return paths, np.asarray(labels, np.int32)


def _find_split(root: Path, name: str) -> Path | None:
    for candidate in (name, *_ALIASES.get(name, ())):
        if candidate and (root / candidate).is_dir():
            return root / candidate
    return None


def open_folder(data_config: Any, split: str) -> FolderSource:
    """Opens a folder data set; see the module for the layouts.

    Args:
      data_config: the section `data` of a config.
      split: "train" or "eval".

    Raises:
      UserError: folder, split, class or images are missing; the message lists what exists.
    """
    if not data_config.dir:
        raise UserError("data.dir: found nothing, expected the folder that holds the images")
    root = Path(data_config.dir).expanduser()
    if not root.is_dir():
        raise UserError(f"data.dir: found no folder {root}; expected one sub-folder per class")
    if data_config.train_list or data_config.eval_list:
        return _open_lists(data_config, root, split)
    train = _find_split(root, data_config.train_split)
    evaluation = _find_split(root, data_config.eval_split)
    if train is None:
        if evaluation is None or not _subfolders(evaluation):  # else a class is called like it
            return _open_single(data_config, root, split)
        if split == "train":
            raise _no_train_folder(data_config, root)
        train = evaluation  # nothing to train on: the classes are those of the evaluation
    classes = _subfolders(train)
    if not classes:
        raise UserError(f"{train}: found no sub-folder, expected one per class")
    if split == "train":
        if evaluation is None and data_config.eval_fraction > 0:
            return _part(train, classes, split, data_config.eval_fraction)
        paths, labels = _scan(train, classes)
        return FolderSource(str(train), paths=paths, labels=labels, label_names=tuple(classes))
    if evaluation is None:
        if data_config.eval_fraction > 0:
            return _part(train, classes, split, data_config.eval_fraction)
        raise UserError(
            f"data.eval_split: found no folder {data_config.eval_split!r} in {root} (it has "
            f"{_listing(_subfolders(root))}); name one of them, or hold out a part of the training "
            f"images with data.eval_fraction"
        )
    found = _subfolders(evaluation)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise UserError(
            f"{evaluation}: found classes that {train} does not have: {_listing(unknown)}; the "
            f"class folders of both must have the same names"
        )
    if not found:
        raise UserError(f"{evaluation}: found no sub-folder, expected one per class")
    paths, labels = _scan(evaluation, found)
    positions = np.asarray([classes.index(name) for name in found], np.int32)
    return FolderSource(
        str(evaluation), paths=paths, labels=positions[labels], label_names=tuple(classes)
    )


def _part(folder: Path, classes: list[str], split: str, fraction: float) -> FolderSource:
    paths, labels = _scan(folder, classes)
    chosen = held_out(labels, fraction)
    if split == "train":
        chosen = ~chosen
    elif not chosen.any():
        raise UserError(f"{folder}: one image per class leaves none to evaluate; add images")
    return FolderSource(
        str(folder),
        paths=[path for path, take in zip(paths, chosen, strict=True) if take],
        labels=labels[chosen],
        label_names=tuple(classes),
    )


def _no_train_folder(data_config: Any, root: Path) -> UserError:
    return UserError(
        f"data.train_split: found no folder {data_config.train_split!r} in {root} (it has "
        f"{_listing(_subfolders(root))}); name one of them, or, if these are the classes, hold out "
        f"a part for evaluation with data.eval_fraction=0.2"
    )


def _open_single(data_config: Any, root: Path, split: str) -> FolderSource:
    classes = _subfolders(root)
    if data_config.eval_fraction <= 0:
        raise _no_train_folder(data_config, root)
    if not classes:
        raise UserError(f"{root}: found no sub-folder, expected one per class")
    return _part(root, classes, split, data_config.eval_fraction)


def _read_list(path: Path) -> list[tuple[str, str]]:
    """The lines of a list: [(file, class or classes)]."""
    if not path.is_file():
        raise UserError(f"{path}: found no such list of files (data.train_list, data.eval_list)")
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip("\r\n ")
        if line and not line.startswith("#"):
            file, _, label = line.partition("\t")
            entries.append((file, label or os.path.basename(os.path.dirname(file))))
    if not entries:
        raise UserError(f"{path}: found an empty list, expected one file per line")
    return entries


def _existing(root: Path, file: str) -> str | None:
    if (root / file).is_file():
        return file
    return next((file + e for e in EXTENSIONS if (root / (file + e)).is_file()), None)


def _open_lists(data_config: Any, root: Path, split: str) -> FolderSource:
    if not (data_config.train_list and data_config.eval_list):
        raise UserError(
            "data.train_list, data.eval_list: found only one of the two, expected both lists"
        )
    lists = {
        "train": _read_list(Path(data_config.train_list).expanduser()),
        "eval": _read_list(Path(data_config.eval_list).expanduser()),
    }
    split_labels = (lambda text: text.split(",")) if data_config.multilabel else (lambda t: [t])
    classes = sorted({c for _, text in lists["train"] for c in split_labels(text)})
    index = {name: i for i, name in enumerate(classes)}
    paths, missing, unknown = [], [], set()
    labels = np.zeros((len(lists[split]), len(classes)), np.float32)
    for row, (file, text) in enumerate(lists[split]):
        found = _existing(root, file)
        if found is None:
            missing.append(file)
            continue
        paths.append(found)
        for name in split_labels(text):
            if name in index:
                labels[row, index[name]] = 1
            else:
                unknown.add(name)
    problems = []
    if missing:
        problems.append(f"{len(missing)} listed files are not in {root}: {_listing(missing)}")
    if unknown:
        problems.append(f"classes that the training list lacks: {_listing(sorted(unknown))}")
    if problems:
        raise UserError(f"data.{split}_list: found {'; '.join(problems)}")
    return FolderSource(
        str(root),
        paths=paths,
        labels=labels if data_config.multilabel else labels.argmax(axis=1).astype(np.int32),
        label_names=tuple(classes),
    )
