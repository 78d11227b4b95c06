"""Converts torchvision's weights; neither torchvision nor PyTorch need be installed.

    python tools/convert_torchvision.py v2_s.pth s.safetensors --model efficientnet_v2_s

IN is a .pth or .safetensors file, read without running what is pickled in it. NAME is torchvision's
or ours.
"""

import functools
import sys
from collections.abc import Sequence

from effv2_jax.convert.conversion import command
from effv2_jax.convert.names_torchvision import SOURCES, convert
from effv2_jax.convert.peers import torchvision_forward
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
        forward=torchvision_forward,
        flags=_FLAGS,
        known_model=functools.partial(find_source, sources=SOURCES),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
