"""A picture beside itself under a heat map of where the evidence for a class lies."""

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from effv2_jax.report.lettering import fitted, font

_SIDE, _GAP, _CAPTION = 360, 8, 44  # px
_INK, _FAINT, _PAPER = "#2b2f36", "#6b7280", "#ffffff"
_COLOURS = "turbo"
_OUTSIDE = 0.35  # brightness of what the network was not shown


def draw_heat_map(
    pixels: np.ndarray,
    heat: np.ndarray,
    *,
    box: tuple[float, float, float, float],
    title: str,
    facts: str,
) -> Image.Image:
    """Returns the picture, the same under the heat map, and two lines of text below.

    Args:
        pixels: uint8 [h, w, 3], the whole picture.
        heat: float [h', w'], not negative; its maximum is shown in the hottest colour.
        box: (top, left, bottom, right) in shares of the picture: what the heat map covers. The
            rest is darkened.
        title: first line below.
        facts: second line.
    """
    picture = Image.fromarray(pixels)
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (2 * width + _GAP, height + _CAPTION), _PAPER)
    page.paste(picture, (0, 0))
    page.paste(_overlay(np.asarray(picture), heat, box), (width + _GAP, 0))
    draw = ImageDraw.Draw(page)
    bold, plain = font(14, bold=True), font(12)
    draw.text((2, height + 5), fitted(title, bold, page.width - 4), _INK, bold)
    draw.text((2, height + 24), fitted(facts, plain, page.width - 4, keep_end=True), _FAINT, plain)
    return page


def _overlay(
    picture: np.ndarray, heat: np.ndarray, box: tuple[float, float, float, float]
) -> Image.Image:
    height, width = picture.shape[:2]
    top, bottom = (min(height - 1, int(share * height)) for share in (box[0], box[2] - 1e-9))
    left, right = (min(width - 1, int(share * width)) for share in (box[1], box[3] - 1e-9))
    rows, columns = slice(top, bottom + 1), slice(left, right + 1)
    shown = picture * np.float32(_OUTSIDE)
    part = picture[rows, columns].astype(np.float32)

    strength = _resized(heat / max(float(heat.max()), 1e-30), part.shape[:2])
    colours = matplotlib.colormaps[_COLOURS](0.04 + 0.86 * strength)[..., :3] * 255
    opacity = (0.15 + 0.5 * strength)[..., None]
    shown[rows, columns] = (1 - opacity) * part + opacity * colours
    return Image.fromarray(np.rint(shown).astype(np.uint8))


def _resized(heat: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(heat.astype(np.float32))
    return np.asarray(picture.resize(shape[::-1], Image.Resampling.BICUBIC)).clip(0, 1)
