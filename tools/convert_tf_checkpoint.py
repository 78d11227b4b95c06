"""Converts a TensorFlow checkpoint of the official code; TensorFlow need not be installed.

    python tools/convert_tf_checkpoint.py v2-s.tgz s.safetensors --model efficientnetv2-s
    python tools/convert_tf_checkpoint.py run/model.ckpt-9 b0.safetensors --model efficientnetv2-b0

IN is a folder, a prefix, one of the checkpoint's files, or an archive (.tgz, .tar.gz, .tar).
"""

import sys
from collections.abc import Sequence

from effv2_jax.convert import tf_checkpoint, tf_forward
from effv2_jax.convert.conversion import command

_FLAGS = {
    "--ema": {
        "choices": tf_checkpoint.EMA,
        "default": "auto",
        "help": "raw variables or moving averages; auto: the averages if there are any",
    },
}


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 2 where the input is wrong."""
    return command(
        arguments,
        description=__doc__,
        convert=tf_checkpoint.convert,
        forward=tf_forward.forward,
        flags=_FLAGS,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
