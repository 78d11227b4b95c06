"""What all converters share: what they return, how it is written and told, and their command.

A converter is a function (path, *, model, num_classes, ...) -> `Conversion`; `command` makes a
command of it. Nothing is skipped silently: every tensor of the source is either a variable of the
result or counted in `left_out`.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effv2_jax.command import Parser, exit_code
from effv2_jax.convert.comparison import flatten
from effv2_jax.convert.weights_file import save_weights
from effv2_jax.data import imagenet
from effv2_jax.data.kinds import EXPECTED, describe, is_kind
from effv2_jax.errors import UserError
from effv2_jax.models.network import EfficientNet, create_model
from effv2_jax.models.variants import get_variant

# The forward pass of another framework: (converted, [N, H, W, 3] normalised) -> logits.
Forward = Callable[["Conversion", np.ndarray], np.ndarray]

_PARITY_IMAGES = 2
_PARITY_SIZE = 192  # even at every stage: asymmetric padding shows
_CHUNK = 1 << 22  # bytes read at once for a checksum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """Weights of another framework as our variables, and an account of the source.

    Attributes:
      model: the network.
      variables: {"params": ..., "batch_stats": ...}.
      info: as `save_weights` takes it; source has framework, file, sha256 and weights.
      num_read: tensors in the source.
      left_out: kind of tensor -> how many of them are no variables of the network.
      seconds: it took to read and convert.
      notes: what a person should know of the source, one line each.
    """

    model: EfficientNet
    variables: dict[str, Any]
    info: dict[str, Any]
    num_read: int
    left_out: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        mapped, left = len(flatten(self.variables)), sum(self.left_out.values())
        if mapped + left != self.num_read:
            raise ValueError(f"{self.num_read} tensors read, {mapped} mapped, {left} left out")


def default_info(
    model_name: str,
    *,
    framework: str,
    file: str | Path,
    sha256: str | None,
    num_classes: int = 0,
    weights: str = "raw",
    image_size: int | None = None,
    preprocessing: Mapping[str, Any] | str | None = None,
) -> dict[str, Any]:
    """Returns what the weights file says about converted weights.

    Args:
      model_name: of the table of architectures; gives what is not told.
      framework: of the source, e.g. "tensorflow".
      file: the source; its name is kept, not its folder.
      sha256: of the source.
      num_classes: outputs; those of ImageNet are named, and the 21,843 are taken to be trained
        each for itself.
      weights: "raw" or "ema".
      image_size: px, at which the weights are evaluated.
      preprocessing: a kind of data/preprocess.py, or {"kind", "mean", "std", "crop",
        "interpolation"}.
    """
    variant = get_variant(model_name)
    image_size = image_size or variant.eval_size
    if preprocessing is None or isinstance(preprocessing, str):
        preprocessing = describe(preprocessing or variant.preprocessing, image_size)
    source = {
        "framework": framework,
        "file": Path(file).name,
        "sha256": sha256,
        "weights": weights,
    }
    if num_classes == imagenet.NUM_21K:
        source["loss"] = "sigmoid"  # README.md of google/automl: the released weights of that size
    return {
        "image_size": image_size,
        "preprocessing": dict(preprocessing),
        "labels": imagenet.labels(num_classes),
        "source": source,
        "metrics": {},
    }


def resolve_model(model: str | EfficientNet, num_classes: int | None) -> EfficientNet:
    """Returns the network by its name, or one made before with another number of classes.

    Args:
      model: a name, or a network that differs from all in the table.
      num_classes: None: 1000, or the network's own.
    """
    if isinstance(model, str):
        return create_model(model, 1000 if num_classes is None else num_classes)
    return model if num_classes is None else model.clone(num_classes=num_classes)


def sha256_of(*paths: str | Path) -> str:
    """Returns the hexadecimal SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def write(conversion: Conversion, out: str | Path) -> None:
    """Writes the weights file, reads it back, compares it bit by bit, and prints the table.

    Raises:
      UserError: it cannot be written; what was there before is still there.
    """
    start = time.monotonic()
    save_weights(out, conversion.model, conversion.variables, conversion.info, verify=True)
    print(table(conversion))
    seconds = time.monotonic() - start
    print(_rows({
        "written": f"{out}, {Path(out).stat().st_size / 1e6:.1f} MB, read back: equal bit by bit",
        "sha256": sha256_of(out),
        "seconds": f"{conversion.seconds:.1f} reading, {seconds:.1f} writing and checking",
    }))  # fmt: skip


def table(conversion: Conversion) -> str:
    """Returns what was read and what became of it, as a table for the terminal."""
    model, source = conversion.model, conversion.info["source"]
    leaves = flatten(conversion.variables)
    sizes = dict.fromkeys(("params", "batch_stats"), 0)
    for path, leaf in leaves:
        sizes[path.split("/")[0]] += np.size(leaf)
    left = ", ".join(f"{kind} {count}" for kind, count in conversion.left_out.items() if count)
    preprocessing = conversion.info["preprocessing"] or {"kind": "unknown"}
    return _rows({
        "source": f"{source['file']} ({source['framework']})",
        "sha256": str(source["sha256"]),
        "model": f"{model.variant}, {model.num_classes} classes, "
                 f"{conversion.info['image_size']} px, preprocessing {preprocessing['kind']}",
        "read": f"{conversion.num_read} tensors",
        "mapped": f"{len(leaves)} tensors, the {source['weights']} weights",
        "left out": left or "nothing",
        "labels": _labels_told(model.num_classes, conversion.info["labels"]),
        **({"note": "; ".join(conversion.notes)} if conversion.notes else {}),
        "parameters": f"{sizes['params']:,} and {sizes['batch_stats']:,} moving statistics",
    })  # fmt: skip


def _labels_told(num_classes: int, labels: Sequence[str] | None) -> str:
    if labels is None:
        return "unknown, told as numbers (--labels FILE)" if num_classes else "no classifier"
    if tuple(labels) == imagenet.labels(num_classes):
        single = ", each for itself" if num_classes == imagenet.NUM_21K else ""
        return (
            f"the {num_classes:,} of ImageNet{single}, by their number (--labels FILE for others)"
        )
    return f"{len(labels)}: {', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''}"


def command(
    arguments: Sequence[str],
    *,
    description: str,
    convert: Callable[..., Conversion],
    forward: Callable[[str], Forward] | None = None,
    flags: Mapping[str, Mapping[str, Any]] | None = None,
    known_model: Callable[[str], Any] = get_variant,
) -> int:
    """Runs a converter's command and returns its exit code: 2 where the input is wrong.

    Args:
      arguments: without the command's name.
      description: for --help.
      convert: (path, *, model, num_classes, **flags) -> Conversion.
      forward: path -> the source framework's forward pass of that file, for --check-parity; raises
        UserError where the framework is not installed.
      flags: more flags, "--ema" -> arguments of argparse, given to `convert` by their names.
      known_model: raises UserError for a name of --model that `convert` does not know.
    """
    return exit_code(_run, arguments, description, convert, forward, dict(flags or {}), known_model)


def _run(
    arguments: Sequence[str],
    description: str,
    convert: Callable[..., Conversion],
    forward: Callable[[str], Forward] | None,
    flags: dict[str, Mapping[str, Any]],
    known_model: Callable[[str], Any],
) -> None:
    parser = Parser(*description.split("\n\n", 1))
    add = parser.add_argument
    add("source", metavar="IN", help="weights of the other framework")
    add("out", metavar="OUT", help="the .safetensors file to write")
    add("--model", required=True, metavar="NAME", help="network, e.g. efficientnetv2-s")
    add("--num-classes", type=int, metavar="N", help="expected classes; default: as in the source")
    add("--labels", metavar="FILE", help="names of the classes: one a line, or a JSON list")
    add("--preprocessing", metavar="KIND", help=f"{EXPECTED}; default: the network's or source's")
    add("--image-size", type=int, metavar="PX", help="default: the network's or source's")
    if forward is not None:
        told = "compare the logits with those of the source's framework, which must be installed"
        add("--check-parity", action="store_true", help=told)
    extra = {add(flag, **settings).dest for flag, settings in flags.items()}
    options = vars(parser.parse_args(arguments))

    # Everything cheap that can be wrong is found before the weights are read.
    out = Path(options["out"])
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"{out}: cannot be written: expected the name of a .safetensors file")
    if not out.parent.is_dir():
        raise UserError(f"{out}: cannot be written: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be written: the folder {out.parent} is read-only")
    kind, size = options["preprocessing"], options["image_size"]
    if kind is not None and not is_kind(kind):
        raise UserError(f"--preprocessing: found {kind!r}, expected one of {EXPECTED}")
    if size is not None and size < 1:
        raise UserError(f"--image-size: found {size}, expected at least 1")
    known_model(options["model"])
    labels = _read_labels(Path(options["labels"])) if options["labels"] else None
    run_theirs = forward(options["source"]) if options.get("check_parity") else None
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # converting needs no accelerator

    conversion = convert(
        options["source"],
        model=options["model"],
        num_classes=options["num_classes"],
        **{key: options[key] for key in extra},
    )
    if labels is not None and len(labels) != conversion.model.num_classes:
        raise UserError(
            f"{options['labels']}: {len(labels)} labels, the weights have "
            f"{conversion.model.num_classes} classes: give one line for each"
        )
    told = _told(conversion.info, labels, kind, size)
    conversion = dataclasses.replace(conversion, info=told)
    deviation = parity(conversion, run_theirs) if run_theirs is not None else None
    write(conversion, out)
    if deviation is not None:
        print(_rows({"parity": f"largest deviation of the logits {deviation:.1e} of their std"}))


def _told(
    info: Mapping[str, Any], labels: list[str] | None, kind: str | None, image_size: int | None
) -> dict[str, Any]:
    """The info with what the flags say instead; None says nothing."""
    size = image_size or info["image_size"]
    usual = info["preprocessing"]
    if kind or usual == describe(usual["kind"], info["image_size"]):
        usual = describe(kind or usual["kind"], size)
    labels = info["labels"] if labels is None else labels
    return {**info, "image_size": size, "preprocessing": usual, "labels": labels}


def parity(conversion: Conversion, forward: Forward) -> float:
    """Returns the largest difference of the logits, relative to their standard deviation.

    Args:
      conversion: our side.
      forward: the source framework's side.
    """
    size = min(conversion.info["image_size"], _PARITY_SIZE)
    shape = (_PARITY_IMAGES, size, size, 3)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    theirs = np.asarray(forward(conversion, images), np.float64)
    ours = np.asarray(jax.jit(conversion.model.apply)(conversion.variables, images), np.float64)
    return float(np.max(np.abs(ours - theirs)) / np.std(theirs))


def _read_labels(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as labels: {reason}") from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise UserError(f"{path}: expected a JSON list of names")
    return [label.strip() for label in found]


def _rows(cells: Mapping[str, str]) -> str:
    return "\n".join(f"{key:<12}{value}" for key, value in cells.items())
