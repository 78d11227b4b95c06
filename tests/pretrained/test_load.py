"""Released weights by name: fetched, verified and converted once, then there without the net."""

import errno
import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

import effv2_jax
from effv2_jax.convert.weights_file import load_weights, read_info, save_weights
from effv2_jax.errors import UserError
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model
from effv2_jax.pretrained import __main__ as command
from effv2_jax.pretrained import download as downloads
from effv2_jax.pretrained import load, load_pretrained, open_weights, released
from effv2_jax.pretrained.released import Released
from tests import reference
from tests.pretrained.server import Site, serving

ROOT = Path(__file__).parents[2]
ARCHIVE = reference.DATA / "checkpoints" / "tiny.tgz"  # raw and averaged variables, ten classes

ROW = Released(
    model="testing", weights="tiny", path="v2/testing-tiny.tgz", num_classes=10, image_size=32,
    preprocessing="advprop", top1=12.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A table of one row and an empty cache."""
    monkeypatch.setattr(released, "RELEASED", (ROW,))
    monkeypatch.setattr(downloads, "_PAUSES", (0.0,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EFFV2_MIRROR", raising=False)
    return tmp_path / "cache" / "effv2_jax" / "weights" / "testing"


@pytest.fixture
def site(monkeypatch):
    with serving(Site({"/v2/testing-tiny.tgz": ARCHIVE.read_bytes()})) as site:
        monkeypatch.setattr(released, "BASE_URL", site.address)
        yield site


def _flat(variables):
    flat = traverse_util.flatten_dict(variables, sep="/")
    return {name: np.asarray(value) for name, value in flat.items()}


def _output(model, variables):
    return jax.eval_shape(model.apply, variables, np.zeros((1, 32, 32, 3), np.float32))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


KEPT = ["tiny.safetensors", "tiny.safetensors.lock", "tiny.safetensors.sha256"]


def test_fetched_once_and_then_without_the_net(site, cache, capsys):
    model, variables, info = effv2_jax.load_pretrained("testing", weights="tiny")
    assert (model.variant, model.num_classes) == ("testing", 10)
    assert len(site.asked) == 1
    assert _names(cache) == KEPT
    assert "ema weights kept in" in capsys.readouterr().err

    site.files.clear()
    again = load_pretrained("testing", "tiny")
    assert len(site.asked) == 1
    assert capsys.readouterr().err == ""
    expected, found = _flat(variables), _flat(again[1])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert again[2] == info


def test_weights_are_the_averages_of_the_checkpoint(site):
    _, variables, _ = load_pretrained("testing", "tiny")
    expected = {
        key.removeprefix("ema/"): value
        for key, value in reference.load_npz("train/a_rmsprop.npz").items()
        if key.startswith("ema/")
    }
    found = np.sort(np.concatenate([leaf.ravel() for leaf in _flat(variables).values()]))
    wanted = np.sort(np.concatenate([value.ravel() for value in expected.values()]))
    np.testing.assert_array_equal(found, wanted)


def test_the_file_says_how_to_use_it(site, cache):
    load_pretrained("testing", "tiny")
    info = read_info(cache / "tiny.safetensors")
    assert info["image_size"] == 32
    assert info["preprocessing"]["kind"] == "advprop"
    assert info["preprocessing"]["mean"] == [127.5] * 3
    assert info["preprocessing"]["interpolation"] == "bicubic"
    assert info["metrics"] == {"published_top1": 0.125}
    source = info["source"]
    assert source["file"] == f"{released.BASE_URL}/v2/testing-tiny.tgz"
    assert (source["framework"], source["weights"], source["loss"]) == (
        "tensorflow", "ema", "softmax",
    )  # fmt: skip
    assert re.fullmatch("[0-9a-f]{64}", source["sha256"])


def test_record_is_what_sha256sum_checks(site, cache):
    load_pretrained("testing", "tiny")
    if shutil.which("sha256sum"):
        record = cache / "tiny.safetensors.sha256"
        subprocess.run(["sha256sum", "--check", record.name], cwd=cache, check=True)


def test_file_that_changed_in_the_cache_is_made_again(site, cache, capsys):
    load_pretrained("testing", "tiny")
    path = cache / "tiny.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    load_pretrained("testing", "tiny")
    assert path.read_bytes() == good
    assert "not the bytes that were recorded; made again" in capsys.readouterr().err


def test_interrupted_conversion_uses_the_archive_that_is_there(site, cache, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "save_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_pretrained("testing", "tiny")
    assert "tiny.tgz" in _names(cache)
    monkeypatch.undo()
    monkeypatch.setattr(released, "RELEASED", (ROW,))
    load_pretrained("testing", "tiny", cache=cache.parent, mirror="http://127.0.0.1:9")
    assert _names(cache) == KEPT


def test_full_disk_keeps_the_archive(site, cache, monkeypatch):
    def full(path, *arguments, **keywords):
        raise UserError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(load, "save_weights", full)
    with pytest.raises(UserError, match="No space left"):
        load_pretrained("testing", "tiny")
    assert "tiny.tgz" in _names(cache)
    assert "tiny.safetensors" not in _names(cache)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>not found</html>", "not a whole gzip archive"),
        (ARCHIVE.read_bytes()[:-100], "not a whole gzip archive"),
        (gzip.compress(b"text", mtime=0), ""),
    ],
)
def test_wrong_content_is_refused_and_not_kept(site, cache, content, says):
    site.files["/v2/testing-tiny.tgz"] = content
    with pytest.raises(UserError) as error:
        load_pretrained("testing", "tiny")
    message = str(error.value)
    assert says in message
    assert message.endswith("the download is removed, start again")
    assert "\n" not in message
    assert _names(cache) == ["tiny.safetensors.lock"]


def test_flipped_byte_is_found_by_a_checksum(site, cache):
    content = bytearray(gzip.decompress(ARCHIVE.read_bytes()))
    content[len(content) // 2] ^= 1
    site.files["/v2/testing-tiny.tgz"] = gzip.compress(bytes(content), mtime=0)
    with pytest.raises(UserError, match="the download is removed"):
        load_pretrained("testing", "tiny")
    assert _names(cache) == ["tiny.safetensors.lock"]


def test_a_mirror_by_address_or_by_folder(site, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(released, "BASE_URL", "http://127.0.0.1:9")  # nobody there
    first = load_pretrained("testing", "tiny", mirror=f"{site.address}/", cache=tmp_path / "a")
    folder = tmp_path / "archives"
    (folder / "v2").mkdir(parents=True)
    shutil.copy(ARCHIVE, folder / "v2" / "testing-tiny.tgz")
    second = load_pretrained("testing", "tiny", mirror=folder, cache=tmp_path / "b")
    (folder / "v2" / "testing-tiny.tgz").rename(folder / "testing-tiny.tgz")
    monkeypatch.setenv("EFFV2_MIRROR", str(folder))
    third = load_pretrained("testing", "tiny", cache=tmp_path / "c")
    assert (folder / "testing-tiny.tgz").is_file()  # not ours to remove
    for other in (second, third):
        found = _flat(other[1])
        assert all(np.array_equal(found[k], v) for k, v in _flat(first[1]).items())


@pytest.mark.parametrize(
    ("mirror", "says"),
    [
        ("empty", "the mirror has no empty/v2/testing-tiny.tgz and empty/testing-tiny.tgz; fetch"),
        ("ftp://site", "mirror ftp://site: expected a folder, or an address with http://"),
    ],
)
def test_mirror_without_the_archive_is_named(mirror, says):
    with pytest.raises(UserError, match=re.escape(says)):
        load_pretrained("testing", "tiny", mirror=mirror)


def test_read_only_cache_is_used_or_says_so(site, cache, tmp_path, monkeypatch):
    load_pretrained("testing", "tiny")

    def refuse(*arguments, **keywords):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(load.caches, "replacing", refuse)
    load_pretrained("testing", "tiny")
    with pytest.raises(UserError) as error:
        load_pretrained("testing", "tiny", cache=tmp_path / "other")
    assert "cannot be written to (Read-only file system), and has no whole tiny" in str(error.value)
    assert "XDG_CACHE_HOME" in str(error.value)


_PROCESS = """
import dataclasses, sys
from effv2_jax.pretrained import load_pretrained, released
released.BASE_URL = sys.argv[1]
row = dataclasses.replace(
    released.RELEASED[0], model="testing", weights="tiny", path="v2/testing-tiny.tgz",
    num_classes=10, image_size=32,
)
released.RELEASED = (row,)
print(len(load_pretrained("testing", "tiny")[1]["params"]))
"""


def test_two_processes_at_once_fetch_once(site, cache):
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, site.address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for _ in range(2)
    ]  # fmt: skip
    ends = [process.communicate(timeout=100) for process in starts]
    assert [process.returncode for process in starts] == [0, 0], ends
    assert len(site.asked) == 1
    assert _names(cache) == KEPT


def test_other_number_of_classes_gets_a_new_classifier_aloud(site, capsys):
    _, variables, _ = load_pretrained("testing", "tiny")
    capsys.readouterr()
    model, found, info = load_pretrained("testing", "tiny", num_classes=3, seed=5)
    assert "testing:tiny: new classifier of 3 classes, drawn with seed 5 (the weights have 10" in (
        capsys.readouterr().err
    )
    assert model.num_classes == info["num_classes"] == 3
    assert info["labels"] is None
    expected = _flat(variables)
    drawn = _flat(init_variables(create_model("testing", 3), 5))
    for name, value in _flat(found).items():
        source = drawn if name.startswith("params/classifier/") else expected
        np.testing.assert_array_equal(value, source[name], err_msg=name)
    assert _output(model, found).shape == (1, 3)


def test_no_classes_leave_the_features(site):
    model, variables, _ = load_pretrained("testing", "tiny", num_classes=0)
    assert "classifier" not in variables["params"]
    assert _output(model, variables).shape == (1, model.head_channels)


def test_same_number_of_classes_keeps_the_classifier(site, capsys):
    load_pretrained("testing", "tiny", num_classes=10)
    assert "new classifier" not in capsys.readouterr().err


def test_weights_are_opened_by_name_and_by_file(site, tmp_path):
    by_name = open_weights("testing:tiny")
    path = tmp_path / "a:b"  # a file of that name is a file
    save_weights(path, by_name[0], by_name[1], by_name[2])
    by_file = open_weights(path)
    assert by_file[2]["source"] == by_name[2]["source"]
    assert jax.tree.all(jax.tree.map(np.array_equal, by_file[1], by_name[1]))
    assert load_weights(path)[2] == by_file[2]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("none.safetensors", "no such file; expected a .safetensors weights file, or NAME:WEIGHTS"),
        ("efficientnetv2-s", "say which weights; released: none"),
        ("testing:tin", "no such weights; did you mean 'tiny'? of testing were released: tiny"),
        ("testin:tiny", "no weights of 'testin' were released; did you mean"),
        ("model.tgz", "convert them first, with tools/convert_tf_checkpoint.py"),
        ("model.pth", "tools/convert_timm.py"),
        ("model.h5", "tools/convert_keras.py"),
    ],
)
def test_what_are_no_weights_is_said_with_what_to_do(spec, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if spec.startswith("model"):
        Path(spec).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        open_weights(spec)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def _command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["pretrained", *arguments])
    return command.main()


def test_command_fetches_and_lists(site, cache, monkeypatch, capsys):
    assert _command(monkeypatch, "testing:tiny") == 0
    assert capsys.readouterr().out == f"{cache / 'tiny.safetensors'}\n"
    assert _command(monkeypatch, "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[1].split() == ["testing:tiny", "32", "10", "advprop", "12.5", "yes"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "say --list, or which weights"),
        (("testing:big",), "of testing were released: tiny"),
        (("--lis",), "unrecognized arguments: --lis"),
        (("testing:tiny", "--mirror", "nowhere"), "the mirror has no nowhere/v2/testing-tiny.tgz"),
    ],
)
def test_command_refuses_in_one_line(monkeypatch, capsys, arguments, says):
    assert _command(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
