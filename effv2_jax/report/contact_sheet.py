"""A contact sheet: many pictures on a page, each with what a network says of it.

The frame is green where the best class is the true one, red where it is not, grey where the truth
is not known. Equal tiles give equal pages.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from effv2_jax.atomic import replacing
from effv2_jax.report.lettering import fitted, font

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PER_PAGE = 96

_COLUMNS = 8
_TILE, _GAP, _FRAME, _MARGIN = 168, 16, 5, 24  # px
_LINE, _TEXT, _HEADER = 17, 13, 62
_INK, _FAINT, _PAPER, _MAT = "#2b2f36", "#6b7280", "#ffffff", "#eef1f5"
# Of Okabe and Ito's palette, which colour-blind people tell apart too.
_FRAMES = {True: "#009E73", False: "#D55E00", None: "#b6bfca"}


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture and what is said of it.

    Attributes:
        pixels: uint8 [h, w, 3], of any size.
        name: of the file.
        label: the best class.
        probability: of that class, 0 to 1.
        truth: the true class, or None if it is not known.
        right: whether both are the same; None if the truth is not known.
    """

    pixels: np.ndarray
    name: str
    label: str
    probability: float
    truth: str | None = None
    right: bool | None = None


def small(pixels: np.ndarray) -> np.ndarray:
    """Returns a picture [h, w, 3] as small as a tile shows it: many are kept in memory."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def write_contact_sheet(path: str | Path, tiles: Sequence[Tile], *, title: str) -> list[Path]:
    """Writes the pages: sheet.png, and sheet-2.png, ... if one does not hold all tiles.

    Args:
        path: of the first page; ends in one of `FORMATS`.
        tiles: in the order of the page, row by row.
        title: what stands above.

    Returns:
        The pages' paths.
    """
    path = Path(path)
    count = -(-len(tiles) // PER_PAGE)
    written = []
    for number in range(count):
        page = path if number == 0 else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")
        facts = _facts(tiles) + (f", page {number + 1} of {count}" if count > 1 else "")
        part = tiles[number * PER_PAGE : (number + 1) * PER_PAGE]
        with replacing(page) as temporary:
            draw_page(part, title=title, facts=facts).save(
                temporary, FORMATS[path.suffix.lower()], quality=92
            )
        written.append(page)
    return written


def draw_page(tiles: Sequence[Tile], *, title: str, facts: str) -> Image.Image:
    """Returns one page.

    Args:
        tiles: row by row; the page is as high as they need.
        title: the first line above them.
        facts: the second.
    """
    # Few pictures stand in a rectangle, not in a row.
    columns = min(_COLUMNS, max(3, int(np.ceil(np.sqrt(1.6 * len(tiles))))))
    rows = -(-len(tiles) // columns)
    lines = 3 if any(tile.right is False for tile in tiles) else 2
    pitch = _TILE + _GAP
    cell = _TILE + 8 + lines * _LINE + _GAP
    size = (2 * _MARGIN + columns * pitch - _GAP, 2 * _MARGIN + _HEADER + rows * cell - _GAP)
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    room = size[0] - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN - 4), fitted(title, font(20, bold=True), room), _INK,
              font(20, bold=True))  # fmt: skip
    draw.text((_MARGIN, _MARGIN + 24), fitted(facts, font(_TEXT), room), _FAINT, font(_TEXT))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        _draw_tile(page, draw, tile, _MARGIN + column * pitch, _MARGIN + _HEADER + row * cell)
    return page


def _draw_tile(
    page: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int
) -> None:
    box = (left, top, left + _TILE - 1, top + _TILE - 1)
    draw.rectangle(box, fill=_MAT, outline=_FRAMES[tile.right], width=_FRAME)
    inside = _TILE - 2 * _FRAME
    picture = Image.fromarray(tile.pixels)
    scale = inside / max(picture.size)
    shape = tuple(max(1, round(side * scale)) for side in picture.size)
    # Small pictures keep their pixels visible instead of becoming a blur.
    method = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS
    picture = picture.resize(shape, method)
    page.paste(
        picture,
        tuple(at + (_TILE - side) // 2 for at, side in zip((left, top), shape, strict=True)),
    )

    bold, plain = font(_TEXT, bold=True), font(_TEXT - 1)
    share = f"{tile.probability:.0%}"
    draw.text((left + _TILE, top + _TILE + 6), share, _INK, font(_TEXT), anchor="ra")
    room = _TILE - font(_TEXT).getlength(share) - 8
    colour = _FRAMES[False] if tile.right is False else _INK
    draw.text((left, top + _TILE + 6), fitted(tile.label, bold, room), colour, bold)
    y = top + _TILE + 6 + _LINE
    if tile.right is False:
        draw.text((left, y), fitted(f"is {tile.truth}", plain, _TILE), _INK, plain)
        y += _LINE
    draw.text((left, y), fitted(tile.name, plain, _TILE, keep_end=True), _FAINT, plain)


def _facts(tiles: Sequence[Tile]) -> str:
    known = [tile.right for tile in tiles if tile.right is not None]
    facts = f"{len(tiles):,} picture{'s' if len(tiles) != 1 else ''}"
    if known:
        facts += f", {sum(known):,} of {len(known):,} right ({sum(known) / len(known):.1%})"
    return facts
