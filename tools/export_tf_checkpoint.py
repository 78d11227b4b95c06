"""Writes weights under the official TensorFlow names; TensorFlow need not be installed.

    python tools/export_tf_checkpoint.py s.safetensors s.npz
    python tools/export_tf_checkpoint.py s.safetensors out/model --format checkpoint --averages

A checkpoint is the files OUT.index and OUT.data-00000-of-00001.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from effv2_jax.command import Parser, exit_code
from effv2_jax.convert import tf_export
from effv2_jax.convert.weights_file import load_weights
from effv2_jax.errors import UserError


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(*__doc__.split("\n\n", 1))
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="a .safetensors file")
    add("out", metavar="OUT", help="the .npz file, or a checkpoint's prefix")
    add("--format", choices=tf_export.FORMATS, default="npz", help="default: npz")
    add("--prefix", metavar="NAME", help='name in front of all names ("": none); default: model')
    add("--averages", action="store_true", help="also as ExponentialMovingAverage")
    options = parser.parse_args(arguments)
    if not Path(options.out).parent.is_dir():
        raise UserError(f"{options.out}: its folder does not exist")
    model, variables, _ = load_weights(options.weights)
    tensors = tf_export.official_tensors(
        model, variables, prefix=options.prefix, averages=options.averages
    )
    files = tf_export.export(tensors, options.out, format=options.format)
    print(f"{len(tensors)} tensors, e.g. {next(iter(tensors))}")
    for path in files:
        print(f"written     {path}, {path.stat().st_size / 1e6:.1f} MB")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
