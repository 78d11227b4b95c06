"""Config files and overrides: `configs/NAME.py[:argument]` and `section.key=value` to a config.

Whatever is wrong in them is the user's to mend, so it becomes one line that names the place.
"""

import importlib.util
import inspect
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from effv2_jax.config import base_config, keys, nearest
from effv2_jax.errors import UserError


def load_config(path: str | Path, argument: str | None = None) -> ConfigDict:
    """Runs `get_config` of a config file.

    Args:
      path: the Python file; it defines `get_config()` or `get_config(argument)`.
      argument: what stood behind the colon of `configs/NAME.py:argument`; None: the file's default.

    Raises:
      UserError: the file is missing, raises, sets an unknown key or does not know the argument.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent
        there = [str(folder / entry.name) for entry in sorted(folder.glob("*.py"))]
        raise UserError(f"no config file {str(path)!r}{nearest(str(path), there)}")
    spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} defines no get_config()")
        arguments = () if argument is None else (argument,)
        if arguments and not inspect.signature(module.get_config).parameters:
            raise UserError(f"{path} takes no argument; found {argument!r} behind the colon")
        config = module.get_config(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_in_config_file(path, error)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() returned {type(config).__name__}, expected the ConfigDict of "
            "effv2_jax.config.base_config()"
        )
    return config


def split_argument(text: str) -> tuple[str, str | None]:
    """Splits "configs/NAME.py:argument" into the path and the argument (None without a colon)."""
    path, separator, argument = text.partition(".py:")
    return (f"{path}.py", argument) if separator else (text, None)


def _in_config_file(path: Path, error: Exception) -> str:
    """One line for an exception out of a config file: the file, the line and what is wrong."""
    if isinstance(error, SyntaxError):
        return f"{error.filename} line {error.lineno}: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    place = f"{path} line {frames[-1].lineno}" if frames else str(path)
    message = str(error).strip("'\"")
    unknown = re.match(r"Key [\"'](\w+)[\"'] does not exist", message)
    if unknown:  # ml_collections: an assignment to a key that the locked schema does not have
        known = keys(base_config())
        name = unknown.group(1)
        alike = [key for key in known if nearest(name, [key.split(".")[1]])]
        hint = nearest(name, [key.split(".")[1] for key in alike]).strip(" ()")
        best = [key for key in alike if hint.endswith(f" {key.split('.')[1]}")]
        return f"{place}: unknown key {name!r}" + (f" (nearest: {', '.join(best)})" if best else "")
    return f"{place}: {type(error).__name__}: {' '.join(message.split())}"


def pick(argument: str, table: Mapping[str, Any] | Iterable[str], *, config: str) -> Any:
    """Returns the entry of a recipe's table that the argument names.

    Args:
      argument: what the user wrote behind the colon.
      table: the variants of the recipe; names alone stand for themselves.
      config: name of the config file, for the message.

    Raises:
      UserError: the recipe has no such variant.
    """
    names = list(table)
    if argument not in names:
        raise UserError(
            f"{config}:{argument}: no such variant{nearest(argument, names)}; "
            f"known: {', '.join(names)}"
        )
    return table[argument] if isinstance(table, Mapping) else argument


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Sets {"section.key": "text"} in place, each text read as the type that the schema gives.

    Lists are written 64,96,128 or (64,96,128); the empty list is () and None is none.

    Raises:
      UserError: names every unknown key and every unreadable value at once.
    """
    known, defaults = keys(config), keys(base_config())
    problems = []
    for key, text in overrides.items():
        if key not in known:
            problems.append(f"unknown key --config.{key}{nearest(key, known)}")
            continue
        section, name = key.split(".")
        try:
            kind = config[section].get_type(name)
            config[section][name] = _read(text, kind, optional=defaults[key] is None)
        except (ValueError, TypeError):
            expected = _EXPECTED[config[section].get_type(name)]
            problems.append(f"--config.{key}={text}: expected {expected}")
    if problems:
        raise UserError("\n  ".join(problems))


_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a list such as 64,96,128",
}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _read(text: str, kind: type, *, optional: bool) -> object:
    if kind is str:
        return text
    word = text.strip().lower()
    if word == "none" and optional:
        return None
    if kind is bool:
        if word not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[word]
    if kind is tuple:
        entries = text.strip().removeprefix("(").removesuffix(")")
        entries = entries.removeprefix("[").removesuffix("]").split(",")
        return tuple(_entry(entry.strip(" '\"")) for entry in entries if entry.strip())
    return kind(text)


def _entry(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
