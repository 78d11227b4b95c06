"""Weights by name or by file: what every command and the public functions go through."""

import gzip
import os
import sys
import zlib
from pathlib import Path
from typing import Any

from effv2_jax.convert import tf_checkpoint
from effv2_jax.convert.conversion import Conversion
from effv2_jax.convert.weights_file import load_weights, save_weights
from effv2_jax.data.kinds import describe
from effv2_jax.errors import UserError
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import EfficientNet, create_model
from effv2_jax.models.variants import list_models
from effv2_jax.pretrained import cache as caches
from effv2_jax.pretrained import released
from effv2_jax.pretrained.download import MIRROR, download
from effv2_jax.pretrained.released import Released

Loaded = tuple[EfficientNet, dict[str, Any], dict[str, Any]]

# What people hold in their hands instead of a weights file of ours -> the tool that converts it.
_CONVERTERS = {
    (".tgz", ".tar.gz", ".index", ".ckpt"): "convert_tf_checkpoint.py",
    (".h5", ".hdf5", ".keras"): "convert_keras.py",
    (".pth", ".pt", ".bin"): "convert_timm.py or convert_torchvision.py",
}


def list_pretrained(model: str | None = None) -> tuple[Released, ...]:
    """Returns the released checkpoints, best described by their attributes (`Released`).

    Args:
        model: only those of this network.
    """
    return tuple(row for row in released.RELEASED if model in (None, row.model))


def load_pretrained(
    name: str,
    weights: str = "imagenet21k-ft1k",
    *,
    num_classes: int | None = None,
    seed: int = 0,
    mirror: str | Path | None = None,
    cache: str | Path | None = None,
) -> Loaded:
    """Returns a network with released weights; downloads and converts them the first time.

    Afterwards the cache is enough; the bytes in it are checked each time.

    Args:
        name: of the network, e.g. "efficientnetv2-s".
        weights: which of its weights, see `list_pretrained`.
        num_classes: outputs; None: those of the weights. Another number makes a new classifier
            (0: none, pooled features).
        seed: of the new classifier.
        mirror: where else the archives are: an address or a folder with the paths of the original
            ("v2/efficientnetv2-s.tgz"); None: $EFFV2_MIRROR, else the original.
        cache: folder of converted weights; None: $XDG_CACHE_HOME/effv2_jax/weights.

    Returns:
        model, variables and info, as `load_weights` returns them; info["labels"] has the names of
        the classes, info["metrics"]["published_top1"] the published accuracy, 0 to 1.

    Raises:
        UserError: no such weights, no way to fetch them, or no place to keep them.
    """
    row = released.find(name, weights)
    loaded = load_weights(fetch(row, mirror=mirror, cache=cache))
    if num_classes is None or num_classes == row.num_classes:
        return loaded
    return with_new_classifier(loaded, num_classes, seed=seed, where=row.name)


def open_weights(spec: str | Path) -> Loaded:
    """Opens WEIGHTS as every command takes them.

    Args:
        spec: a weights file, or NAME:WEIGHTS as for `load_pretrained`.

    Returns:
        model, variables and info, as `load_weights` returns them.

    Raises:
        UserError: neither a whole weights file nor the name of released weights.
    """
    path, spec = Path(spec), str(spec)
    if not path.exists() and released.names_weights(spec):
        return load_weights(fetch(released.parse(spec)))
    if spec in list_models() and not path.exists():
        known = ", ".join(row.name for row in list_pretrained(spec)) or "none"
        raise UserError(f"{spec}: say which weights; released: {known}")
    for endings, tool in _CONVERTERS.items():
        if path.exists() and path.name.endswith(endings):
            raise UserError(
                f"{spec}: weights of another framework: convert them first, with tools/{tool}"
            )
    if not path.exists():
        raise UserError(
            f"{spec}: no such file; expected a .safetensors weights file, or NAME:WEIGHTS such as "
            "efficientnetv2-s:imagenet21k-ft1k (python -m effv2_jax.pretrained --list)"
        )
    return load_weights(path)


def fetch(
    row: Released, *, mirror: str | Path | None = None, cache: str | Path | None = None
) -> Path:
    """Returns the file of released weights in the cache; downloads and converts if needed.

    Args:
        row: which.
        mirror: as in `load_pretrained`.
        cache: likewise.

    Raises:
        UserError: as `load_pretrained`.
    """
    path = caches.weights_path(caches.cache_folder(cache), row)
    if caches.is_intact(path):
        return path
    with caches.locked(path):
        if caches.is_intact(path):  # whoever had the lock has made it
            return path
        if path.exists():
            _say(f"{path}: not the bytes that were recorded; made again")
        archive, is_copy = _archive(row, path, mirror)
        try:
            _check_gzip(archive)
            model = create_model(row.model, row.num_classes, blocks=row.blocks)
            conversion = tf_checkpoint.convert(archive, model=model, num_classes=row.num_classes)
        except UserError as error:
            if not is_copy:
                raise
            archive.unlink(missing_ok=True)
            raise UserError(f"{error}; the download is removed, start again") from None
        _write(conversion, row, path)
        if is_copy:
            archive.unlink(missing_ok=True)
    return path


def with_new_classifier(loaded: Loaded, num_classes: int, *, seed: int, where: str) -> Loaded:
    """Replaces the classifier by a fresh one, and says so on standard error.

    Args:
        loaded: model, variables, info.
        num_classes: outputs of the new one; 0: none, pooled features.
        seed: it is drawn with.
        where: name of the weights, for the message.
    """
    model, variables, info = loaded
    new = create_model(info["model"], num_classes, **info["overrides"])
    params = {name: value for name, value in variables["params"].items() if name != "classifier"}
    told = "without the classifier"
    if num_classes:
        params["classifier"] = init_variables(new, seed)["params"]["classifier"]
        told = f"new classifier of {num_classes} classes, drawn with seed {seed}"
    _say(f"{where}: {told} (the weights have {model.num_classes} classes)")
    info = {**info, "num_classes": num_classes, "labels": None, "metrics": {}}
    return new, {**variables, "params": params}, info


def _archive(row: Released, path: Path, mirror: str | Path | None) -> tuple[Path, bool]:
    """The checkpoint's archive, and whether it is a copy that nobody else needs."""
    place = str(mirror or os.environ.get(MIRROR) or released.BASE_URL)
    if "://" not in place:
        return _in_folder(Path(place).expanduser(), row), False
    if not place.startswith(("http://", "https://")):
        raise UserError(
            f"mirror {place}: expected a folder, or an address with http:// or https://"
        )
    url = f"{place.rstrip('/')}/{row.path}"
    archive = path.with_name(f"{row.weights}.tgz")
    if not archive.is_file():  # there, if the conversion was interrupted
        download(url, archive, size=row.size)
    return archive, True


def _in_folder(folder: Path, row: Released) -> Path:
    """The archive in a local folder: at its own path, or by its name where that is unmistakable."""
    name = Path(row.path).name
    candidates = [folder / row.path]
    if sum(Path(other.path).name == name for other in released.RELEASED) == 1:
        candidates.append(folder / name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " and ".join(str(candidate) for candidate in candidates)
    raise UserError(f"{row.name}: the mirror has no {looked}; fetch {row.url} and put it there")


def _check_gzip(archive: Path) -> None:
    """Reads the archive to its end, where its checksum is."""
    try:
        with gzip.open(archive) as file:
            while file.read(2**22):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: not a whole gzip archive ({error})") from None


def _write(conversion: Conversion, row: Released, path: Path) -> None:
    """Writes the weights file of a checkpoint, and the record of its bytes."""
    source = {**conversion.info["source"], "file": row.url, "loss": row.loss}
    info = {
        **conversion.info,
        "image_size": row.image_size,
        "preprocessing": describe(row.preprocessing, row.image_size),
        "source": source,
        "metrics": {} if row.top1 is None else {"published_top1": row.top1 / 100},
    }
    save_weights(path, conversion.model, conversion.variables, info, verify=True)
    caches.write_record(path)
    _say(
        f"{row.name}: {conversion.num_read} tensors read and checked, {source['weights']} weights "
        f"kept in {path}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
