"""Text in pictures drawn with Pillow: one typeface, the same on every machine."""

import functools
from pathlib import Path

import matplotlib
from PIL import ImageFont


@functools.cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns DejaVu Sans, which comes with matplotlib and has most alphabets.

    Args:
        size: px.
        bold: the bold one.
    """
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def fitted(text: str, face: ImageFont.FreeTypeFont, width: float, *, keep_end: bool = False) -> str:
    """Returns the text, cut to a width.

    Args:
        text: one line.
        face: what it is drawn with.
        width: px.
        keep_end: cut in the middle and keep more of the end, as file names need it.
    """
    text = " ".join(text.split())
    if face.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        tail = kept * 2 // 3 if keep_end else 0
        cut = f"{text[: kept - tail]}…{text[len(text) - tail :]}"
        if face.getlength(cut) <= width:
            return cut
    return ""
