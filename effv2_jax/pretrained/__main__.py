"""Lists the released weights, or fetches some into the cache.

    python -m effv2_jax.pretrained --list
    python -m effv2_jax.pretrained efficientnetv2-s:imagenet21k-ft1k [--mirror PLACE] [--cache DIR]

Prints the path of the converted file. Every command that takes WEIGHTS fetches by itself; this is
for machines that will have no access later. Exit codes: 0 done, 2 the input is wrong.
"""

import sys

from effv2_jax.command import Parser, exit_code
from effv2_jax.errors import UserError
from effv2_jax.pretrained import cache as caches
from effv2_jax.pretrained import released


def _parser() -> Parser:
    parser = Parser(*__doc__.split("\n\n", 1), prog="python -m effv2_jax.pretrained")
    add = parser.add_argument
    add("weights", nargs="*", metavar="NAME:WEIGHTS", help="what to fetch; several are allowed")
    add("--list", action="store_true", help="list all that were released, and what is there")
    add("--mirror", metavar="PLACE", help="address or folder instead of the original")
    add("--cache", metavar="DIR", help="folder of converted weights")
    return parser


def table(cache: str | None = None) -> str:
    """Returns the table of released weights as text.

    Args:
        cache: folder of converted weights, see `load_pretrained`.
    """
    folder = caches.cache_folder(cache)
    rows = [("weights", "px", "classes", "images", "top-1", "cached")]
    for row in released.RELEASED:
        top1 = "-" if row.top1 is None else f"{row.top1:.1f}"
        cached = "yes" if caches.weights_path(folder, row).is_file() else ""
        size, classes = str(row.image_size), f"{row.num_classes:,}"
        rows.append((row.name, size, classes, row.preprocessing, top1, cached))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:{widths[0]}}  {size:>{widths[1]}}  {classes:>{widths[2]}}  {kind:{widths[3]}}  "
        f"{top1:>{widths[4]}}  {cached}".rstrip()
        for name, size, classes, kind, top1, cached in rows
    ]
    note = f"top-1: as published, percent, on ImageNet's validation set; cache: {folder}"
    return "\n".join([*lines, note])


def run(arguments: list[str]) -> None:
    """Does what the command line says.

    Raises:
        UserError: flags or names are wrong, or the weights cannot be had.
    """
    options = _parser().parse_args(arguments)
    if not options.list and not options.weights:
        raise UserError("say --list, or which weights: NAME:WEIGHTS; --help shows the flags")
    rows = [released.parse(spec) for spec in options.weights]
    if options.list:
        print(table(options.cache))
    if rows:
        from effv2_jax.pretrained.load import fetch  # imports JAX
    for row in rows:
        print(fetch(row, mirror=options.mirror, cache=options.cache))


def main() -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
