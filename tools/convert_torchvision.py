"""Converts torchvision's weights; neither torchvision nor PyTorch need be installed.

    python tools/convert_torchvision.py v2_s.pth s.safetensors --model efficientnet_v2_s

IN is a .pth or .safetensors file, read without running what is pickled in it. NAME is torchvision's
or ours.
"""

import sys
from collections.abc import Sequence

from effv2_jax.convert import names_torchvision
from effv2_jax.convert.peers import torchvision_forward
from effv2_jax.convert.source import framework_command
from effv2_jax.convert.torch_weights import KEY_FLAG


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 2 where the input is wrong."""
    return framework_command(
        arguments,
        description=__doc__,
        names=names_torchvision,
        forward=torchvision_forward,
        flags=KEY_FLAG,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
