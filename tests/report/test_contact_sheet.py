"""Contact sheets and heat maps: what a person must be able to see in them."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from effv2_jax.report import contact_sheet
from effv2_jax.report.contact_sheet import Tile, draw_page, small, write_contact_sheet
from effv2_jax.report.heat_map import draw_heat_map
from effv2_jax.report.lettering import fitted, font


def tile(value=128, shape=(40, 60), **changes):
    pixels = np.full((*shape, 3), value, np.uint8)
    return Tile(
        **{"pixels": pixels, "name": "1.jpg", "label": "ant", "probability": 0.9, **changes}
    )


def colours(image, box):
    return {tuple(c) for c in np.asarray(image.crop(box)).reshape(-1, 3)}


@pytest.mark.parametrize("right", [True, False, None])
def test_frame_tells_whether_the_prediction_is_right(right):
    page = draw_page([tile(right=right, truth="bee")], title="t", facts="f")
    found = colours(page, (0, 0, page.width, page.height))
    for key, colour in contact_sheet._FRAMES.items():
        assert (ImageColor.getrgb(colour) in found) == (key == right), key


def test_picture_keeps_its_shape_and_every_tile_is_there():
    values = [40, 90, 140, 190]
    tiles = [tile(value, shape=(10, 30)) for value in values]
    page = np.asarray(draw_page(tiles, title="t", facts="f"))
    side = contact_sheet._TILE - 2 * contact_sheet._FRAME
    for value in values:
        rows, columns = np.nonzero((page == value).all(-1))
        assert np.ptp(columns) + 1 == side
        assert np.ptp(rows) + 1 == pytest.approx(side / 3, abs=1)


def test_equal_tiles_give_equal_files(tmp_path):
    tiles = [tile(v, right=v > 100, truth="bee") for v in (50, 100, 150)]
    for name in ("a.png", "b.png"):
        write_contact_sheet(tmp_path / name, tiles, title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_many_tiles_fill_several_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "PER_PAGE", 4)
    written = write_contact_sheet(tmp_path / "sheet.jpg", [tile()] * 9, title="t")
    assert [path.name for path in written] == ["sheet.jpg", "sheet-2.jpg", "sheet-3.jpg"]
    assert Image.open(written[2]).height < Image.open(written[1]).height


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3), (300, 200)])
def test_any_shape_can_be_shown(shape):
    shown = small(np.zeros((*shape, 3), np.uint8))
    assert max(shown.shape) <= contact_sheet._TILE
    draw_page([tile(shape=shown.shape[:2])], title="t" * 300, facts="f" * 300)
    heat = draw_heat_map(
        np.zeros((*shape, 3), np.uint8), np.ones((7, 7)), box=(0, 0, 1, 1), title="t", facts="f"
    )
    assert heat.width > heat.height or shape[0] > shape[1]


@pytest.mark.parametrize("keep_end", [False, True])
def test_text_is_cut_to_its_room(keep_end):
    face = font(13)
    text = "a long name of a file that goes on 0123456789.jpg"
    for width in (20, 60, 120, 1000):
        cut = fitted(text, face, width, keep_end=keep_end)
        assert face.getlength(cut) <= width
    assert fitted(text, face, 1000) == text
    assert fitted(text, face, 120, keep_end=True).endswith("9.jpg") == keep_end or not keep_end
    assert fitted("two\nlines", face, 1000) == "two lines"


def test_heat_map_is_hot_there_and_dark_outside_of_what_was_shown():
    pixels = np.full((200, 400, 3), 128, np.uint8)
    heat = np.zeros((8, 8))
    heat[1, 6] = 2
    page = np.asarray(
        draw_heat_map(pixels, heat, box=(0.0, 0.25, 1.0, 0.75), title="t", facts="f")
    ).astype(int)
    left = page.shape[1] // 2 + 4  # of the overlay: 360 wide, 180 high
    assert (page[90, left + 40] < 60).all()  # outside of the box
    assert (page[90, 40] == 128).all()  # the picture itself
    hot = page[int(180 * 1.5 / 8), left + 90 + int(180 * 6.5 / 8)]
    cold = page[int(180 * 5.5 / 8), left + 90 + int(180 * 1.5 / 8)]
    assert hot[0] > hot[2] + 60  # red
    assert cold[2] >= cold[0]  # blue


def test_picture_without_evidence_is_drawn():
    pixels = np.full((20, 20, 3), 128, np.uint8)
    draw_heat_map(pixels, np.zeros((2, 2)), box=(0, 0, 1, 1), title="t", facts="f")
