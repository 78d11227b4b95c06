"""Checkpoints are found in folders, by prefixes and in archives; nothing else is touched."""

import io
import os
import re
import shutil
import tarfile
import tempfile

import pytest

from effv2_jax import UserError
from effv2_jax.convert import checkpoint_files
from effv2_jax.convert.checkpoint_files import find
from effv2_jax.convert.tensor_bundle import Bundle
from tests.convert import checkpoints

FULL = checkpoints.FOLDER / "full"


def archive(path, members, *, mode="w:gz"):
    """Writes an archive of (name, bytes) or `TarInfo`s without content."""
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def files_of(folder, *, start="tiny/"):
    """The files of a checkpoint as members, data before the index as the alphabet has it."""
    return [(f"{start}{path.name}", path.read_bytes()) for path in sorted(folder.iterdir())]


def message_of(path) -> str:
    with pytest.raises(UserError) as caught:
        find(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "path",
    [FULL, FULL / "model.ckpt-5", FULL / "model.ckpt-5.index",
     FULL / "model.ckpt-5.data-00000-of-00001", FULL / "model.ckpt-5.meta"],
    ids=lambda path: path.name,
)  # fmt: skip
def test_folder_prefix_and_each_file_name_the_same_checkpoint(path):
    assert find(path).where == str(FULL / "model.ckpt-5")
    assert len(Bundle(find(path)).entries) == 313


@pytest.mark.parametrize(
    ("mode", "start"), [("w", "a/b/"), ("w", "./"), ("w:gz", ""), ("w:bz2", "./"), ("w:xz", "a/")]
)
def test_archives_of_any_kind_are_read(tmp_path, mode, start):
    path = archive(tmp_path / "released.tgz", files_of(FULL, start=start), mode=mode)
    bundle = Bundle(find(path))
    assert len(bundle.read(bundle.entries)) == 313
    assert os.listdir(tmp_path) == ["released.tgz"]


def test_nothing_of_an_archive_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bundle = Bundle(find(checkpoints.FOLDER / "tiny.tgz"))
    bundle.read(bundle.entries)
    assert not list(tmp_path.iterdir())


def test_only_the_tensors_of_an_archive_are_copied(tmp_path, monkeypatch):
    big = [("tiny/model.meta", bytes(1000)), ("tiny/README", bytes(1000))]
    path = archive(tmp_path / "a.tgz", [*files_of(FULL), *big])
    copied = []
    original = checkpoint_files._copied
    monkeypatch.setattr(
        checkpoint_files,
        "_copied",
        lambda tar, member, name: copied.append(name) or original(tar, member, name),
    )
    find(path)
    assert copied == [
        "tiny/checkpoint", "tiny/model.ckpt-5.data-00000-of-00001", "tiny/model.ckpt-5.index"
    ]  # fmt: skip


def link(name, target, kind):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, str(target)
    return entry


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    "member",
    [
        ("../model.index", b""),
        ("tiny/../../model.index", b""),
        ("/etc/model.index", b""),
        ("..", b""),
        link("tiny/model.index", "/etc/passwd", tarfile.SYMTYPE),
        link("tiny/model.index", "tiny/x", tarfile.LNKTYPE),
        link("tiny/model.index", "", tarfile.FIFOTYPE),
        link("../out", "", tarfile.DIRTYPE),
    ],
    ids=["parent", "inner parent", "absolute", "dots", "symlink", "hard link", "fifo", "folder"],
)
def test_archives_that_point_out_of_themselves_are_refused(tmp_path, mode, member):
    path = archive(tmp_path / "bad.tar", [*files_of(FULL), member], mode=mode)
    assert "points out of the archive or is no plain file" in message_of(path)
    assert os.listdir(tmp_path) == ["bad.tar"]


@pytest.mark.parametrize("kept", [0, 1, 100, 1000, 0.5, 0.99])
def test_cut_off_archives_are_noticed(tmp_path, kept):
    content = (checkpoints.FOLDER / "tiny.tgz").read_bytes()
    path = tmp_path / "cut.tgz"
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert "not a whole archive" in message_of(path)


def test_an_archive_with_a_flipped_byte_is_noticed(tmp_path):
    content = bytearray((checkpoints.FOLDER / "tiny.tgz").read_bytes())
    content[len(content) // 2] ^= 16
    path = tmp_path / "flipped.tgz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        Bundle(find(path)).read(set())


def test_an_archive_without_the_data_is_told(tmp_path):
    members = [member for member in files_of(FULL) if "data" not in member[0]]
    path = archive(tmp_path / "a.tgz", members)
    with pytest.raises(UserError, match=r"model\.ckpt-5\.data-00000-of-00001 is not in it"):
        Bundle(find(path))


def test_no_space_for_an_archive_is_told(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"no space for .* set TMPDIR"):
        find(checkpoints.FOLDER / "tiny.tgz")


def test_what_does_not_exist_is_told_with_what_there_is(tmp_path):
    assert "there are: model.ckpt-5" in message_of(FULL / "model.ckpt-6")
    assert "no such checkpoint" in message_of(tmp_path / "nothing" / "model")
    assert "no file ends in .index" in message_of(tmp_path)
    archive(tmp_path / "empty.tgz", [("a", b"")])
    assert "no file ends in .index" in message_of(tmp_path / "empty.tgz")


@pytest.mark.parametrize(
    ("name", "tool"),
    [("a.h5", "convert_keras"), ("a.pth", "convert_timm"), ("a.safetensors", "convert_timm")],
)
def test_files_of_others_point_to_their_tool(tmp_path, name, tool):
    (tmp_path / name).write_bytes(b"x" * 1000)
    assert tool in message_of(tmp_path / name)


def test_other_files_are_no_archives(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n" * 1000)
    assert "not a whole archive" in message_of(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("state", "chosen"),
    [
        ('model_checkpoint_path: "b"\nall_model_checkpoint_paths: "a"\n', "b"),
        ('model_checkpoint_path: "/cns/of/another machine/b"\n', "b"),
        ('all_model_checkpoint_paths: "a"\nmodel_checkpoint_path: "\\303\\251"\n', "é"),
    ],
)
def test_the_file_checkpoint_chooses_among_several(tmp_path, state, chosen):
    for name in ("a", "b", "é"):
        (tmp_path / f"{name}.index").write_bytes(b"")
    (tmp_path / "checkpoint").write_text(state)
    assert find(tmp_path).where == str(tmp_path / chosen)


def test_several_checkpoints_without_a_choice_are_told(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.index").write_bytes(b"")
    assert "several checkpoints, and none is named: give one of a, b" in message_of(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "c"\n')
    assert "names 'c', not one of them" in message_of(tmp_path)


def test_a_renamed_checkpoint_is_found_where_it_is_the_only_one(tmp_path):
    (tmp_path / "a.index").write_bytes(b"")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-99"\n')
    assert find(tmp_path).where == str(tmp_path / "a")


def test_an_index_without_its_data_says_what_to_copy(tmp_path):
    shutil.copy(FULL / "model.ckpt-5.index", tmp_path)
    with pytest.raises(UserError, match=r"data-00000-of-00001 is not beside .*\.index.*copy or"):
        Bundle(find(tmp_path))
