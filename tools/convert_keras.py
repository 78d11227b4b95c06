"""Converts weights of keras.applications; Keras need not be installed, only h5py.

    python tools/convert_keras.py b0.weights.h5 b0.safetensors --model EfficientNetV2B0

IN is a .weights.h5, .keras or .h5 file. NAME is that of keras.applications or ours.
"""

import sys
from collections.abc import Sequence

from effv2_jax.convert import names_keras
from effv2_jax.convert.peers import keras_forward
from effv2_jax.convert.source import framework_command


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 2 where the input is wrong."""
    return framework_command(
        arguments,
        description=__doc__,
        names=names_keras,
        forward=keras_forward,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
