"""Converts timm's weights; neither timm nor PyTorch need be installed.

    python tools/convert_timm.py model.safetensors s.safetensors --model tf_efficientnetv2_s.in21k
    python tools/convert_timm.py model_best.pth.tar b0.safetensors --model tf_efficientnet_b0

IN is a .safetensors, .pth, .bin or .pth.tar file, read without running what is pickled in it. NAME
is timm's, with the tag of the weights (it says how images are made) or without (timm's default), or
ours.
"""

import functools
import sys
from collections.abc import Sequence

from effv2_jax.convert.conversion import command
from effv2_jax.convert.names_timm import SOURCES, convert
from effv2_jax.convert.peers import timm_forward
from effv2_jax.convert.source import find_source

_FLAGS = {
    "--key": {
        "metavar": "PART",
        "help": "part of a training checkpoint; default: the moving average, else the weights",
    },
}


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 2 where the input is wrong."""
    return command(
        arguments,
        description=__doc__,
        convert=convert,
        forward=timm_forward,
        flags=_FLAGS,
        known_model=functools.partial(find_source, sources=SOURCES),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
