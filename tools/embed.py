"""Writes the pooled features of pictures, the input of a network's classifier, to a .npz file.

python tools/embed.py WEIGHTS FOLDER --out features.npz

table = numpy.load("features.npz")
table["features"]    # float32 [N, C]
table["names"]       # the pictures
table["labels"]      # the folders that they lie in
"""

import sys
from collections.abc import Sequence

from effv2_jax import command, startup
from effv2_jax.inference.pictures import add_picture_flags, find_pictures


def _parser() -> command.Parser:
    parser = command.Parser(*__doc__.split("\n\n", 1))
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="a .safetensors file, or NAME:WEIGHTS as released")
    add_picture_flags(parser)
    add("--out", metavar="FILE", required=True, help="the .npz file")
    return parser


def _run(arguments: Sequence[str]) -> None:
    options = _parser().parse_intermixed_args(arguments)
    command.check_output("--out", options.out, endings=(".npz",))
    command.say(startup.tune(sys.argv, enabled=not options.no_tune))
    pictures = find_pictures(options.pictures)

    from effv2_jax.inference import embed  # imports JAX: its settings come first

    embed.run(
        options.weights,
        pictures,
        out=options.out,
        image_size=options.image_size,
        batch_size=options.batch_size,
        skip_broken=options.on_corrupt == "skip",
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return command.exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
