"""A file is hashed once for as long as it is the same, and always when somebody asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdopt.bundle import disk, stamps
from sdopt.bundle.files import Bundle
from sdopt.bundle.stamps import known_sha256, sha256
from sdopt.errors import BundleError
from tests.conftest import ROOT


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, own_folders: Path) -> list[Path]:
    """The files whose bytes were read, in order."""
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256(path)

    monkeypatch.setattr(stamps, "sha256", counted)
    return read


def old(path: Path, content: bytes, seconds: float = 10) -> Path:
    """A file that was last changed so long ago; its change of status, which nobody can set, is not waited for."""
    path.write_bytes(content)
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "FRESH_NS", 0)


@pytest.mark.usefixtures("patient")
def test_a_file_that_stays_as_it_is_is_read_once(tmp_path: Path, hashed: list[Path]) -> None:
    path = old(tmp_path / "weights", b"many")
    assert [known_sha256(path) for _ in range(3)] == [sha256(path)] * 3
    assert hashed == [path]
    known_sha256(path, paranoid=True)
    assert hashed == [path, path]


@pytest.mark.usefixtures("patient")
def test_any_change_is_seen(tmp_path: Path, hashed: list[Path]) -> None:
    path = old(tmp_path / "weights", b"many")
    known_sha256(path)
    status = path.stat()
    path.write_bytes(b"mony")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time as before; the change of status tells
    assert known_sha256(path) == sha256(path)
    old(tmp_path / "other", b"mine").replace(path)
    assert known_sha256(path) == sha256(path)
    assert len(hashed) == 3


def test_a_file_that_was_just_changed_gets_no_stamp(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"many")
    known_sha256(path)
    known_sha256(path)
    assert hashed == [path, path]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"file": 1, "sha256": "0"}'])
def test_a_damaged_stamp_is_made_again(text: str, tmp_path: Path, hashed: list[Path], own_folders: Path) -> None:
    path = old(tmp_path / "weights", b"many")
    known_sha256(path)
    (stamp,) = (own_folders / "cache/sdopt/stamps").iterdir()
    stamp.write_text(text)
    assert [known_sha256(path) for _ in range(2)] == [sha256(path)] * 2
    assert hashed == [path, path]


@pytest.mark.usefixtures("patient")
def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old(tmp_path / "weights", b"many")
    old(tmp_path / "file", b"no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [known_sha256(path) for _ in range(2)] == [sha256(path)] * 2
    assert hashed == [path, path]


@pytest.mark.usefixtures("patient")
def test_a_bundle_is_hashed_at_its_first_opening_and_whenever_it_changed(bundle_copy: Path, hashed: list[Path]) -> None:
    Bundle.open(bundle_copy)
    first = len(hashed)
    assert first > 3
    Bundle.open(bundle_copy)
    assert len(hashed) == first
    Bundle.open(bundle_copy, paranoid=True)
    assert len(hashed) == 2 * first
    weights = bundle_copy / "unet.onnx.data"
    status = weights.stat()
    with weights.open("r+b") as stream:
        stream.write(b"\xff")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        Bundle.open(bundle_copy)


def test_without_a_home_a_picture_is_made_all_the_same(tmp_path: Path) -> None:
    code = """
from pathlib import Path
def home():
    raise RuntimeError("Could not determine home directory.")
Path.home = home
from sdopt.cli.main import main
raise SystemExit(main(["generate", "a red apple", "--steps", "1", "--size", "64x64", "-o", "a.png"]))
"""
    free = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HOME"))}
    command = [sys.executable, "-c", code]
    environment = {**free, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "a.png").exists()) == (0, True), done.stderr


def test_a_file_that_was_new_when_reading_began_gets_no_stamp_however_long_that_took(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have changed while it was read, at a time that its file system does not tell from the one before."""
    path = tmp_path / "a"
    path.write_bytes(b"new")
    moments, now = iter([0.0, 60.0]), time.time_ns()
    monkeypatch.setattr(stamps.time, "time_ns", lambda: now + int(1e9 * next(moments, 60.0)))
    known_sha256(path)
    monkeypatch.undo()
    assert not list((tmp_path / "cache").rglob("stamps/*"))


@pytest.mark.usefixtures("patient")
def test_stamps_have_a_bound_and_those_of_files_that_are_gone_go_first(
    tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "MAX_STAMPS", 20)
    folder = own_folders / "cache/sdopt/stamps"
    for i in range(30):  # bundles that come and go
        path = old(tmp_path / f"gone-{i}", b"x")
        known_sha256(path)
        path.unlink()
        assert len(list(folder.iterdir())) <= 20
    paths = [old(tmp_path / f"file-{i}", b"x") for i in range(10)]
    for path in paths:
        known_sha256(path)
    for i in range(10):
        path = old(tmp_path / f"more-{i}", b"x")
        known_sha256(path)
        path.unlink()
    assert all(stamps.stamped_sha256(path) for path in paths)


@pytest.mark.usefixtures("patient")
def test_of_too_many_stamps_those_stay_that_were_used_last(
    tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "MAX_STAMPS", 8)
    paths = [old(tmp_path / f"{i}", b"x") for i in range(8)]
    for i, path in enumerate(paths):
        known_sha256(path)
        stamp = stamps._stamp(path)
        assert stamp is not None
        then = time.time() - (30 - i) * 24 * 3600
        os.utime(stamp, (then, then))
    assert stamps.stamped_sha256(paths[0])  # a use
    known_sha256(old(tmp_path / "new", b"x"))
    assert [bool(stamps.stamped_sha256(path)) for path in paths] == [True, *[False] * 3, *[True] * 4]


@pytest.mark.usefixtures("patient")
def test_a_stamp_that_nobody_used_for_long_goes(tmp_path: Path, own_folders: Path) -> None:
    first, second = old(tmp_path / "a", b"x"), old(tmp_path / "b", b"x")
    known_sha256(first)
    (stamp,) = (own_folders / "cache/sdopt/stamps").iterdir()
    then = time.time() - disk.UNUSED_SECONDS - 60
    os.utime(stamp, (then, then))
    known_sha256(second)
    assert not stamp.exists()


def test_processes_that_stamp_and_forget_at_once_disturb_nobody(tmp_path: Path, own_folders: Path) -> None:
    code = """
import sys
from pathlib import Path
from sdopt.bundle import stamps
stamps.FRESH_NS, stamps.MAX_STAMPS = 0, 5
for path in 3 * sorted(Path(sys.argv[1]).iterdir()):
    assert stamps.known_sha256(path) == stamps.sha256(path)
"""
    files = tmp_path / "files"
    files.mkdir()
    for i in range(30):
        old(files / f"{i}", b"%d" % i)
    command = [sys.executable, "-c", code, str(files)]
    for process in [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]:
        assert process.wait(60) == 0
    assert len(list((own_folders / "cache/sdopt/stamps").iterdir())) <= 5 + 2  # of those that came last
