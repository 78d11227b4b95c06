"""Writes weights of ours under timm's names, for timm.create_model(...).load_state_dict.

    python tools/export_timm.py s.safetensors timm_s.safetensors

tools/convert_timm.py reads the result back to exactly the same weights.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.numpy

from effv2_jax.atomic import replacing
from effv2_jax.command import Parser, exit_code
from effv2_jax.convert import names_timm
from effv2_jax.convert.weights_file import load_weights
from effv2_jax.errors import UserError


def _export(arguments: Sequence[str]) -> None:
    parser = Parser(*__doc__.split("\n\n", 1))
    parser.add_argument("weights", metavar="WEIGHTS", help="a weights file of ours")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    flags = parser.parse_args(arguments)
    out = Path(flags.out)
    if out.suffix != ".safetensors" or out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: cannot be written: expected a .safetensors file in a folder")
    model, variables, info = load_weights(flags.weights)
    tensors = names_timm.export(model, variables)
    try:
        with replacing(out) as temporary:
            safetensors.numpy.save_file(tensors, temporary, {"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: cannot be written: {reason}") from None
    print(f"{out}: {len(tensors)} tensors of {model.variant} under timm's names")
    print(_advice(names_timm.timm_name(model), model.num_classes, info))


def _advice(name: str | None, num_classes: int, info: dict) -> str:
    if name is None:
        return "timm has no network of exactly this architecture, padding and epsilon"
    text = f'timm.create_model("{name}", num_classes={num_classes})'
    preprocessing = info["preprocessing"]
    if preprocessing:
        mean, std = ([round(v / 255, 4) for v in preprocessing[key]] for key in ("mean", "std"))
        text += f"; images of {info['image_size']} px, mean {mean}, std {std}"
    return text


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_export, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
