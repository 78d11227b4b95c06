"""What a trained network sees in pictures.

    python tools/predict.py WEIGHTS IMAGE|FOLDER|PATTERN|- ...
    python tools/predict.py best.safetensors photos/ --contact-sheet sheet.png --attribution cam/
    python tools/predict.py best.safetensors 'photos/**/*.jpg' --format csv --out predictions.csv
    find photos -name '*.jpg' | python tools/predict.py best.safetensors - --top-k 1

Size, normalisation and names of the classes come from the weights. Results go to standard output,
everything else to standard error.
"""

import sys
from collections.abc import Sequence

from effv2_jax import command, startup
from effv2_jax.inference.pictures import add_picture_flags, find_pictures
from effv2_jax.report.contact_sheet import FORMATS


def _parser() -> command.Parser:
    parser = command.Parser(*__doc__.split("\n\n", 1))
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="a .safetensors file, or NAME:WEIGHTS as released")
    add_picture_flags(parser)
    add("--top-k", type=command.positive, default=5, metavar="K", help="classes told; default: 5")
    add("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    add("--out", metavar="FILE", help="write the results there instead of to standard output")
    add("--contact-sheet", metavar="FILE", help=f"one picture of all ({', '.join(FORMATS)})")
    add("--attribution", metavar="DIR", help="write Grad-CAM overlays there, one per picture")
    add("--layer", default="head_1x1",
        help="feature maps that Grad-CAM looks at: head_1x1 (default), features, reduction_1..5, "
        "block_0.., stem")  # fmt: skip
    add("--labels-subset", choices=("imagenet1k",), default="",
        help="for weights of ImageNet21k: only the classes of ImageNet")  # fmt: skip
    return parser


def _run(arguments: Sequence[str]) -> None:
    options = _parser().parse_intermixed_args(arguments)
    command.check_output("--out", options.out)
    command.check_output("--contact-sheet", options.contact_sheet, endings=tuple(FORMATS))
    command.check_folder("--attribution", options.attribution)
    command.say(startup.tune(sys.argv, enabled=not options.no_tune))
    pictures = find_pictures(options.pictures)

    from effv2_jax.inference import predict  # imports JAX: its settings come first

    predict.run(
        predict.Request(
            weights=options.weights,
            pictures=pictures,
            top_k=options.top_k,
            batch_size=options.batch_size,
            image_size=options.image_size,
            format=options.format,
            out=options.out,
            contact_sheet=options.contact_sheet,
            attribution=options.attribution,
            layer=options.layer,
            skip_broken=options.on_corrupt == "skip",
            labels_subset=options.labels_subset,
        )
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return command.exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
