"""Converts timm's weights; neither timm nor PyTorch need be installed.

    python tools/convert_timm.py model.safetensors s.safetensors --model tf_efficientnetv2_s.in21k
    python tools/convert_timm.py model_best.pth.tar b0.safetensors --model tf_efficientnet_b0

IN is a .safetensors, .pth, .bin or .pth.tar file, read without running what is pickled in it. NAME
is timm's, with the tag of the weights (it says how images are made) or without (timm's default), or
ours.
"""

import sys
from collections.abc import Sequence

from effv2_jax.convert import names_timm
from effv2_jax.convert.peers import timm_forward
from effv2_jax.convert.source import framework_command
from effv2_jax.convert.torch_weights import KEY_FLAG


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 2 where the input is wrong."""
    return framework_command(
        arguments,
        description=__doc__,
        names=names_timm,
        forward=timm_forward,
        flags=KEY_FLAG,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
