"""Nothing good is overwritten before the new is complete."""

import json
import os
import stat

import pytest

from effv2_jax.atomic import replacing, write_json


def test_new_content_appears_under_the_name(tmp_path):
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_old_content_survives_a_failed_write(tmp_path, error):
    def fail() -> None:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error

    (tmp_path / "a").write_text("old")
    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_others_may_read_the_file_as_the_umask_says(tmp_path):
    """Also when the writer makes a file of its own, as safetensors does, for itself alone."""
    (tmp_path / "usual").write_text("")
    with replacing(tmp_path / "new") as temporary:
        (tmp_path / "private").touch(mode=0o600)
        (tmp_path / "private").rename(temporary)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "new")]
    assert modes[0] == modes[1]
