"""The config: the schema's defaults, the checks that need no data, and the JSON form.

`base_config()` (config_schema.py) has every option with its default, unit and bound; a recipe in
`configs/` sets what differs; `validate` refuses what cannot work before any work starts.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from effv2_jax.config_schema import base_config
from effv2_jax.errors import UserError

__all__ = ["base_config", "from_json", "keys", "nearest", "to_json", "validate"]

# Keys that take one of a few words; None ("derived") where the schema has it.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.activation": (
        *("silu", "swish", "silu_native", "relu", "relu6", "hswish", "gelu", "mish"),
        *("leaky_relu", "elu", "selu"),
    ),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.initializer": ("official", "fan_in"),
    "model.lowering": ("auto", "plain", "cpu", "gpu"),
    "model.padding": ("SAME", "SYMMETRIC"),
    "data.source": ("tfds", "folder", "arrays", "digits", "synthetic"),
    "data.crop": ("inception", "none"),
    "data.augment": ("none", "randaugment", "autoaugment", "ra_aa"),
    "data.on_corrupt": ("error", "skip"),
    "data.decoder": ("pillow", "pillow_draft", "simplejpeg"),
    "data.cache": ("none", "decoded"),
    "train.optimizer": ("rmsprop", "momentum", "sgd", "adam", "adamw"),
    "train.schedule": ("exponential", "cosine", "linear", "constant"),
    "train.loss": ("softmax", "sigmoid", "summed_sigmoid"),
    "train.on_nonfinite": ("stop", "skip"),
    "eval.label_subset": ("none", "imagenet1k"),
    "runtime.distributed": ("auto", "off"),
    "progressive.preset": ("official", "paper", "none"),
}

_Rule = tuple[Callable[[Any], bool], str]


def _at_least(low: float) -> _Rule:
    return lambda value: value >= low, f"at least {low:g}"


def _above(low: float) -> _Rule:
    return lambda value: value > low, f"above {low:g}"


def _share(*, zero: bool = True, one: bool = True) -> _Rule:
    bounds = f"{'from' if zero else 'above'} 0 {'to' if one else 'to below'} 1"
    return lambda value: (0 < value < 1) or (zero and value == 0) or (one and value == 1), bounds


def _each(rule: _Rule) -> _Rule:
    return lambda values: all(rule[0](value) for value in values), f"every entry {rule[1]}"


def _pair(*, high: float) -> _Rule:
    def holds(pair: tuple) -> bool:
        return len(pair) == 2 and 0 < pair[0] <= pair[1] <= high

    bound = f" <= {high:g}" if high < float("inf") else ""
    return holds, f"two numbers (low, high), 0 < low <= high{bound}"


# Keys with a range. A value None ("derived") is always allowed where the schema has it.
_RANGES: dict[str, _Rule] = {
    "model.num_classes": _at_least(1),
    "model.width": _above(0),
    "model.depth": _above(0),
    "model.survival_prob": _share(zero=False),
    "model.bn_momentum": _share(one=False),
    "model.bn_epsilon": _above(0),
    "model.bn_group_size": _at_least(0),
    "data.eval_fraction": _share(one=False),
    "data.num_examples": _at_least(1),
    "data.crop_area": _pair(high=1),
    "data.crop_aspect": _pair(high=float("inf")),
    "data.crop_attempts": _at_least(1),
    "data.augment_layers": _at_least(1),
    "data.random_erasing": _share(),
    "data.workers": _at_least(0),
    "data.threads": _at_least(1),
    "data.prefetch": _at_least(1),
    "train.seed": (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"),
    "train.batch_size": _at_least(1),
    "train.epochs": _above(0),
    "train.min_steps": _at_least(0),
    "train.learning_rate": _above(0),
    "train.min_learning_rate": _at_least(0),
    "train.warmup_epochs": _at_least(0),
    "train.decay_epochs": _above(0),
    "train.decay_factor": _share(zero=False),
    "train.weight_decay": _at_least(0),
    "train.weight_decay_inc": _at_least(0),
    "train.decoupled_weight_decay": _at_least(0),
    "train.ema_decay": _share(one=False),
    "train.label_smoothing": _share(one=False),
    "train.gradient_clip": _at_least(0),
    "progressive.stages": _at_least(1),
    "progressive.image_size": _above(0),
    "progressive.min_image_size": _at_least(1),
    "progressive.magnitude": _at_least(0),
    "progressive.mixup_alpha": _at_least(0),
    "progressive.cutmix_alpha": _at_least(0),
    "progressive.dropout_rate": _share(one=False),
    "progressive.image_sizes": _each(_at_least(1)),
    "progressive.epochs": _each(_above(0)),
    "progressive.magnitudes": _each(_at_least(0)),
    "progressive.mixup_alphas": _each(_at_least(0)),
    "progressive.cutmix_alphas": _each(_at_least(0)),
    "progressive.dropout_rates": _each(_share(one=False)),
    "progressive.batch_sizes": _each(_at_least(1)),
    "eval.batch_size": _at_least(1),
    "eval.image_size": _above(0),
    "eval.every_epochs": _above(0),
    "runtime.devices": _at_least(0),
    "runtime.checkpoint_every_minutes": _at_least(0),
    "runtime.checkpoint_every_steps": _at_least(0),
    "runtime.keep_last": _at_least(1),
    "runtime.keep_best": _at_least(0),
    "runtime.log_every_steps": _at_least(1),
}

# Lists with one entry a stage.
_STAGE_LISTS = (
    *("image_sizes", "epochs", "magnitudes", "mixup_alphas", "cutmix_alphas", "dropout_rates"),
    "batch_sizes",
)
_STAGE_KEYS = tuple(f"progressive.{name}" for name in _STAGE_LISTS)

# The type of the entries of every list.
ENTRY_TYPES: dict[str, type] = {
    "model.blocks": str,
    "data.crop_area": float,
    "data.crop_aspect": float,
    **dict.fromkeys(_STAGE_KEYS, float),
    "progressive.image_sizes": int,
    "progressive.batch_sizes": int,
}

_PATTERNS = ("train.weight_decay_exclude", "init.freeze")


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns " (nearest: X)" for the known word most like `word`, or "" when none is alike.

    A word that is part of known ones, such as mixup, stands for those if none is much alike.
    """
    known = list(known)
    last = word.rpartition(".")[2]
    ends = [name.rpartition(".")[2] for name in known]
    same = [name for name, end in zip(known, ends, strict=True) if end == last]
    longer = [n for n, end in zip(known, ends, strict=True) if len(last) > 3 and last in end]
    matches = (
        difflib.get_close_matches(word, known, n=1, cutoff=0.8)
        or (same or longer)[:3]
        or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    )
    return f" (nearest: {', '.join(matches)})" if matches else ""


def keys(config: ConfigDict) -> dict[str, Any]:
    """Returns {"section.key": value} of a two-level config, in its order."""
    return {
        f"{section}.{key}": value
        for section, content in config.items()
        if isinstance(content, ConfigDict)
        for key, value in content.items()
    }


def validate(config: ConfigDict) -> None:
    """Checks everything about a config that needs no data and no device.

    Raises:
      UserError: names every problem at once: the key, the value found, the values allowed.
    """
    problems = list(_structure(config))
    if not problems:  # the checks of values rely on keys and types
        values = keys(config)
        problems += _single_values(values)
        problems += _stage_lists(values)
        problems += _conflicts(values)
    if len(problems) == 1:
        raise UserError(f"config: {problems[0]}")
    if problems:
        raise UserError(f"the config has {len(problems)} problems:\n  " + "\n  ".join(problems))


def _structure(config: ConfigDict) -> Iterator[str]:
    """Unknown and missing keys, and values of a wrong type, against the schema."""
    schema = base_config()
    known, found = keys(schema), keys(config)
    for section in config:
        if section not in schema:
            yield f"unknown section {section!r}{nearest(section, schema)}"
    for key in found:
        if key not in known and key.split(".")[0] in schema:
            yield f"unknown key {key!r}{nearest(key, known)}"
    for key, default in known.items():
        section, name = key.split(".")
        if key not in found:
            yield f"{key} is missing: start from effv2_jax.config.base_config()"
            continue
        value, kind = found[key], schema[section].get_type(name)
        if value is None and default is None:
            continue
        if not _is(value, kind):
            yield f"{key} = {value!r}: expected {_KIND_NAMES[kind]}" + (
                " or None" if default is None else ""
            )
        elif kind is tuple and not all(_is(entry, ENTRY_TYPES[key]) for entry in value):
            yield f"{key} = {value!r}: expected {_KIND_NAMES[ENTRY_TYPES[key]]} in every entry"


def _is(value: Any, kind: type) -> bool:
    """Whether a value has the type of its key; a whole number is a number, True is none."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, tuple | list if kind is tuple else kind)


_KIND_NAMES = {
    int: "a whole number", float: "a finite number", bool: "True or False",
    str: "a text", tuple: "a list such as (1, 2)",
}  # fmt: skip


def _single_values(values: dict[str, Any]) -> Iterator[str]:
    from effv2_jax.data import kinds  # tables; they import no JAX
    from effv2_jax.models import variants

    names = (*variants.list_models(), *variants.list_models("timm"))
    if values["model.name"] not in (*names, "testing"):
        yield (
            f"model.name = {values['model.name']!r}: no such model"
            f"{nearest(values['model.name'], names)}; known: {', '.join(names)}, testing"
        )
    for key, allowed in CHOICES.items():
        if values[key] is not None and values[key] not in allowed:
            hint = nearest(values[key], allowed)
            yield f"{key} = {values[key]!r}: expected one of {', '.join(allowed)}{hint}"
    preprocessing = values["data.preprocessing"]
    if not kinds.is_kind(preprocessing):
        yield (
            f"data.preprocessing = {preprocessing!r}: expected one of {kinds.EXPECTED}"
            f"{nearest(preprocessing, kinds.KINDS)}"
        )
    for key, (holds, expected) in _RANGES.items():
        if values[key] is not None and not holds(values[key]):
            yield f"{key} = {values[key]!r}: expected {expected}"
    for key in _PATTERNS:
        try:
            re.compile(values[key])
        except re.error as error:
            yield f"{key} = {values[key]!r}: not a regular expression: {error}"
    if values["model.blocks"]:
        yield from _blocks(values["model.blocks"])
    if values["init.weights"] and not Path(values["init.weights"]).is_file():
        yield from _released_weights(values["init.weights"], values["model.name"])


def _released_weights(spec: str, model: str) -> Iterator[str]:
    from effv2_jax.pretrained import released  # a table; imports no JAX

    if not released.names_weights(spec):
        yield (
            f"init.weights = {spec!r}: no such file; expected a weights file or NAME:WEIGHTS such "
            "as efficientnetv2-s:imagenet21k"
        )
        return
    try:
        row = released.parse(spec)
    except UserError as error:
        yield f"init.weights = {error}"
        return
    if row.model != model:
        yield (
            f"init.weights = {spec}: weights of another network than model.name = {model!r}: set "
            f"model.name={row.model} or choose other weights"
        )


def _blocks(rows: tuple) -> Iterator[str]:
    from effv2_jax.models import block_spec  # a parser; imports no JAX

    try:
        block_spec.expand_blocks(block_spec.parse_blocks(rows), width=1.0, depth=1.0)
    except UserError as error:
        yield f"model.blocks: {error}"


def _stage_lists(values: dict[str, Any]) -> Iterator[str]:
    """Explicit lists agree in length with each other and with the number of stages."""
    lengths = {key: len(values[key]) for key in _STAGE_KEYS if values[key]}
    if values["progressive.stages"] is not None:
        lengths["progressive.stages"] = values["progressive.stages"]
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        yield f"stage lists disagree on the number of stages ({found}): one entry a stage each"


def _conflicts(values: dict[str, Any]) -> Iterator[str]:
    """Values that are possible alone and impossible together."""
    source = values["data.source"]
    if source == "tfds" and not values["data.name"]:
        yield "data.source = 'tfds' needs the data set's name: data.name=imagenette/320px-v2"
    if source in ("folder", "arrays") and not values["data.dir"]:
        yield f"data.source = {source!r} needs the place of the images: data.dir=FOLDER"
    if bool(values["data.train_list"]) != bool(values["data.eval_list"]):
        yield "data.train_list, data.eval_list: only one is set; official splits need both lists"

    epochs = sum(values["progressive.epochs"]) or values["train.epochs"]
    if values["train.warmup_epochs"] > epochs > 0 and not values["train.min_steps"]:
        yield (
            f"train.warmup_epochs = {values['train.warmup_epochs']:g} is longer than the whole run "
            f"({'progressive' if values['progressive.epochs'] else 'train'}.epochs: {epochs:g})"
        )
    if values["train.min_learning_rate"] > values["train.learning_rate"] > 0:
        yield (
            f"train.min_learning_rate = {values['train.min_learning_rate']:g} is above "
            f"train.learning_rate = {values['train.learning_rate']:g}"
        )
    if values["train.decoupled_weight_decay"] and values["train.optimizer"] != "adamw":
        yield (
            f"train.decoupled_weight_decay = {values['train.decoupled_weight_decay']:g} has no "
            f"effect with train.optimizer = {values['train.optimizer']!r}: use adamw"
        )
    if values["eval.label_subset"] != "none" and values["data.multilabel"]:
        yield "eval.label_subset needs one class per example, data.multilabel = True gives several"
    if not values["eval.raw"] and not (values["eval.ema"] and values["train.ema_decay"]):
        yield "eval.raw = False without a moving average to evaluate: no weights to evaluate"

    if values["progressive.magnitudes"] and values["data.augment"] in ("none", "autoaugment"):
        yield (
            f"progressive.magnitudes has no effect with data.augment = {values['data.augment']!r}: "
            "use randaugment or ra_aa"
        )
    batches = [("train.batch_size", values["train.batch_size"])]
    batches += [("progressive.batch_sizes", size) for size in values["progressive.batch_sizes"]]
    for unit in ("runtime.devices", "model.bn_group_size"):
        for key, size in batches:
            if values[unit] > 0 and size % values[unit]:
                yield f"{key} = {size}: not divisible by {unit} = {values[unit]}"


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON text, as kept in `config.json` of a run."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str, *, source: str = "config.json") -> ConfigDict:
    """Returns the config that `to_json` wrote. Keys added to the schema since get their default.

    Args:
      text: JSON.
      source: the file's name, for messages.

    Raises:
      UserError: not JSON, or a key the schema does not have.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    config = base_config()
    known = keys(config)
    for section, entries in content.items():
        for name, value in entries.items():
            key = f"{section}.{name}"
            if key not in known:
                raise UserError(f"{source}: unknown key {key!r}{nearest(key, known)}")
            config[section][name] = tuple(value) if isinstance(value, list) else value
    return config
