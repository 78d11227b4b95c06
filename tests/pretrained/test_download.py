"""Downloads from a server that breaks off, lies or has another file."""

import base64
import hashlib
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from effv2_jax.errors import UserError
from effv2_jax.pretrained import download as downloads
from effv2_jax.pretrained.download import download
from tests.pretrained.server import Site, serving

ROOT = Path(__file__).parents[2]
CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(downloads, "_PAUSES", (0.0, 0.0))


@pytest.fixture
def site():
    with serving(Site({"/file.tgz": CONTENT})) as site:
        yield site


def _download(site, tmp_path, **arguments) -> bytes:
    path = tmp_path / "file.tgz"
    download(f"{site.address}/file.tgz", path, **arguments)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.tgz"]
    return path.read_bytes()


def _refused(site, tmp_path, **arguments) -> str:
    with pytest.raises(UserError) as error:
        download(f"{site.address}/file.tgz", tmp_path / "file.tgz", **arguments)
    assert not (tmp_path / "file.tgz").exists()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_file_arrives_whole_and_is_told(site, tmp_path, capsys):
    assert _download(site, tmp_path, size=len(CONTENT)) == CONTENT
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"file.tgz: {site.address}/file.tgz, 0.3 MB",
        "file.tgz: 0.3 MB fetched",
    ]


def test_broken_connection_continues_where_it_broke(site, tmp_path, capsys):
    site.break_after = [100_000, 50_000, None]
    assert _download(site, tmp_path) == CONTENT
    assert [wanted for _, wanted in site.asked] == [None, "bytes=100000-", "bytes=150000-"]
    told = capsys.readouterr().err
    assert "broken off after 0.1 MB (0.3 MB expected); trying again" in told
    assert "continuing at 0.1 MB of 0.3 MB" in told


def test_a_second_start_continues_what_the_first_left(site, tmp_path):
    site.break_after = [100_000, 0]
    message = _refused(site, tmp_path)
    assert "broken off after 0.1 MB" in message
    assert "start again to continue" in message
    assert (tmp_path / "file.tgz.part").stat().st_size == 100_000
    site.break_after, site.asked = [None], []
    assert _download(site, tmp_path) == CONTENT
    assert site.asked == [("/file.tgz", "bytes=100000-")]


def test_another_file_on_the_server_is_fetched_from_its_beginning(site, tmp_path):
    site.break_after = [100_000, 0]
    _refused(site, tmp_path)
    site.files["/file.tgz"] = CONTENT[::-1]
    site.break_after = [None]
    assert _download(site, tmp_path) == CONTENT[::-1]


def test_what_came_from_another_address_is_not_continued(site, tmp_path):
    site.break_after = [100_000, 0]
    _refused(site, tmp_path)
    other = CONTENT[::-1]
    site.files["/other.tgz"], site.break_after, site.asked = other, [None], []
    download(f"{site.address}/other.tgz", tmp_path / "file.tgz")
    assert site.asked == [("/other.tgz", None)]
    assert (tmp_path / "file.tgz").read_bytes() == other


@pytest.mark.parametrize("lacking", ["ranges", "validators"])
def test_server_that_cannot_continue_starts_anew(site, tmp_path, lacking):
    setattr(site, lacking, False)
    site.break_after = [100_000, None]
    assert _download(site, tmp_path) == CONTENT


def test_part_longer_than_the_file_is_dropped(site, tmp_path):
    site.break_after = [100_000, 0]
    _refused(site, tmp_path)
    with open(tmp_path / "file.tgz.part", "ab") as file:
        file.write(bytes(len(CONTENT)))
    site.break_after = [None]
    assert _download(site, tmp_path) == CONTENT


def test_file_without_a_length_arrives(site, tmp_path, capsys):
    site.hide_length = True
    assert _download(site, tmp_path) == CONTENT
    assert "size unknown" in capsys.readouterr().err


def test_wrong_size_is_refused_before_it_is_fetched(site, tmp_path):
    message = _refused(site, tmp_path, size=299_999)
    assert "has 300,000 bytes, expected 299,999: not the released file" in message


def test_wrong_content_is_refused_and_removed(site, tmp_path):
    site.md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    assert _download(site, tmp_path) == CONTENT
    (tmp_path / "file.tgz").unlink()
    site.files["/file.tgz"] = CONTENT[:-1] + b"\0"
    assert "arrived damaged" in _refused(site, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_one_line(site, tmp_path):
    site.files = {}
    message = _refused(site, tmp_path)
    assert "file.tgz: HTTP 404 Not Found" in message
    assert "EFFV2_MIRROR" in message
    assert len(site.asked) == 1


def test_overloaded_server_is_asked_again(site, tmp_path):
    site.status = [503, 200]
    assert _download(site, tmp_path) == CONTENT


def test_no_access_to_the_net_is_said_at_once(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = types.SimpleNamespace(address=f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: pytest.fail("waited"))
    message = _refused(nobody, tmp_path)
    assert "cannot be reached" in message
    assert "EFFV2_MIRROR" in message


def test_no_room_is_said_before_anything_is_fetched(site, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(total=0, used=0, free=100_000)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    message = _refused(site, tmp_path)
    assert "no space: file.tgz needs 0.3 MB more, 0.1 MB are free" in message


def test_disk_that_fills_up_keeps_what_arrived(site, tmp_path):
    """A limit on the size of files fails in the same place as a full disk."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from effv2_jax.errors import UserError\n"
        "from effv2_jax.pretrained.download import download\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: download(sys.argv[1], Path(sys.argv[2]))\n"
        "except UserError as error: sys.exit(str(error))\n"
    )
    path = tmp_path / "file.tgz"
    done = subprocess.run(
        [sys.executable, "-c", code, f"{site.address}/file.tgz", str(path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "no space (File too large) after 0.2 MB" in line
    assert "start again to continue there" in line
    site.asked = []
    assert _download(site, tmp_path) == CONTENT
    assert site.asked == [("/file.tgz", "bytes=200000-")]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written_to_is_named(site, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in _refused(site, tmp_path)


def test_a_terminal_sees_a_bar(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(downloads, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(downloads, "_CHUNK", 100_000)
    assert _download(site, tmp_path) == CONTENT
    told = capsys.readouterr().err
    assert "####################" in told
    assert "MB/s" in told
    assert told.endswith("file.tgz: 0.3 MB fetched\n")
