"""Which pictures are meant: folders, patterns, names on standard input."""

import io
import os

import pytest

from effv2_jax.errors import UserError
from effv2_jax.inference.pictures import find_pictures, folder_name, natural_order
from tests.data.pictures import write_tree


@pytest.fixture
def photos(tmp_path, monkeypatch):
    names = ("10.jpg", "2.jpg", "b/x.PNG", "b/deep/1.webp", "a/y.jpeg", "notes.txt", ".hidden.jpg",
             ".git/z.jpg")  # fmt: skip
    write_tree(tmp_path / "photos", dict.fromkeys(names, b"x"))
    monkeypatch.chdir(tmp_path)


def test_folder_gives_all_pictures_below_it_in_natural_order(photos):
    expected = ["photos/2.jpg", "photos/10.jpg", "photos/a/y.jpeg", "photos/b/deep/1.webp",
                "photos/b/x.PNG"]  # fmt: skip
    assert find_pictures(["photos"]) == expected
    assert find_pictures(["photos/**"]) == expected
    assert find_pictures(["photos/*"]) == expected  # a folder that matches is opened


def test_pattern_takes_only_what_it_matches(photos):
    assert find_pictures(["photos/*.jpg"]) == ["photos/2.jpg", "photos/10.jpg"]
    assert find_pictures(["photos/**/*.webp"]) == ["photos/b/deep/1.webp"]


def test_named_file_is_taken_whatever_it_is_called_and_each_once(photos):
    names = ["photos/notes.txt", "photos/10.jpg", "photos/*.jpg"]
    assert find_pictures(names) == ["photos/notes.txt", "photos/10.jpg", "photos/2.jpg"]


def test_file_whose_name_looks_like_a_pattern(photos, tmp_path):
    (tmp_path / "photo[1].jpg").write_bytes(b"x")
    assert find_pictures(["photo[1].jpg"]) == ["photo[1].jpg"]


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_names_are_read_from_standard_input(photos, separator):
    text = separator.join(["photos/10.jpg", "", "photos/a"]) + separator
    found = find_pictures(["photos/2.jpg", "-"], stdin=io.BytesIO(text.encode()))
    assert found == ["photos/2.jpg", "photos/10.jpg", "photos/a/y.jpeg"]


def test_name_that_is_no_text_survives_standard_input(photos):
    name = b"photos/caf\xe9.jpg"
    with open(name, "wb") as file:
        file.write(b"x")
    assert find_pictures(["-"], stdin=io.BytesIO(name)) == [os.fsdecode(name)]


def test_all_problems_are_named_together(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        find_pictures(["none.jpg", "empty", "photos/*.gif", "photos"])
    message = str(caught.value)
    assert "none.jpg: no such file or folder" in message
    assert "empty: found no picture in this folder, expected files ending in .jpg" in message
    assert "photos/*.gif: found no picture that this pattern matches" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xd8\xff\xe0 a picture", "found a picture itself"),
        (b"\n \n", "found no names"),
        (b"no/such.jpg", "no/such.jpg: no such file"),
        (b"*.jpg", r"\*\.jpg: no such file"),  # names, not patterns
    ],
)
def test_wrong_standard_input_is_explained(photos, data, says):
    with pytest.raises(UserError, match=says):
        find_pictures(["-"], stdin=io.BytesIO(data))


def test_natural_order_compares_numbers_by_value_and_folders_as_a_whole():
    names = ["b10/1.jpg", "b2/1.jpg", "B1/1.jpg", "a/2.jpg", "a/1_10.jpg", "a/1_9.jpg"]
    expected = ["a/1_9.jpg", "a/1_10.jpg", "a/2.jpg", "B1/1.jpg", "b2/1.jpg", "b10/1.jpg"]
    assert natural_order(names) == expected


def test_folder_name_is_that_of_the_nearest_folder(photos):
    assert folder_name("photos/b/deep/1.webp") == "deep"
