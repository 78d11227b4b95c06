"""The command: flags -> config -> train or evaluate. The only place that reads flags.

    python -m effv2_jax.main --config configs/NAME.py[:argument] --workdir DIR
        [--mode train|eval] [--no-tune] [--config.train.epochs=5 ...]

Exit codes: 0 done; 2 the input is wrong (one line on stderr, no traceback); 128 + signal when a
signal ended the run after saving; 1 anything else.
"""

import sys
from pathlib import Path

from effv2_jax import startup
from effv2_jax.command import Parser, exit_code
from effv2_jax.config import nearest, validate
from effv2_jax.config_files import apply_overrides, load_config, split_argument
from effv2_jax.errors import UserError

_EPILOG = """\
any key of the config can be set behind it:
  --config.train.epochs=5 --config.progressive.image_sizes=64,96,128 --config.model.remat=true
all keys, their defaults and bounds: effv2_jax/config_schema.py; recipes: configs/
"""


def _parser() -> Parser:
    parser = Parser(
        "Train or evaluate an EfficientNet. Started again on a workdir, it continues.",
        _EPILOG,
        prog="python -m effv2_jax.main",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:ARGUMENT]", help="recipe, e.g. configs/digits.py")
    add("--workdir", required=True, metavar="DIR", help="where the run keeps its files")
    add("--mode", choices=("train", "eval"), default="train", help="default: train")
    add("--no-tune", action="store_true", help="leave allocator and XLA flags as they are")
    return parser


def _split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separates --config.key=value (or --config.key value) from the other flags."""
    flags, overrides = [], {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--config."):
            flags.append(argument)
            continue
        key, separator, value = argument.removeprefix("--config.").partition("=")
        if not separator:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
        overrides[key] = value
    return flags, overrides


def run(arguments: list[str]) -> None:
    """Does what the command line says.

    Raises:
      UserError: flags, config or data are wrong; nothing was trained.
    """
    flags, overrides = _split_overrides(arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(flags)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown flag {unknown[0]}{nearest(unknown[0], [*known, '--config.'])}")
    if not options.workdir.strip():  # Path("") would be the current folder
        raise UserError("--workdir is empty; name a folder for the run's files")
    config = load_config(*split_argument(options.config))
    apply_overrides(config, overrides)
    validate(config)

    # Everything above costs milliseconds. JAX is imported below only: its settings come first.
    print(startup.tune(sys.argv, enabled=not options.no_tune), flush=True)
    from effv2_jax.training import loop

    if options.mode == "train":
        loop.train(config, Path(options.workdir))
    else:
        loop.evaluate(config, Path(options.workdir))


def main() -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
