"""A folder appears whole or not at all, whoever else writes it, is killed, or has filled the disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sdopt.bundle import unfinished as module
from sdopt.bundle.unfinished import locked, put_in_place, unfinished
from sdopt.bundle.write import check_target, new_folder
from sdopt.errors import BundleError, UsageError
from tests.conftest import ROOT

WRITER = """
import os, sys
from pathlib import Path
from sdopt.bundle.write import new_folder
from sdopt.errors import SdoptError
target, word = Path(sys.argv[1]), sys.argv[2]
try:
    with new_folder(target, force="force" in sys.argv) as folder:
        (folder / "manifest.json").write_text('{"format_version": 0}')
        (folder / "who").write_text(word)
        print("ready", flush=True)
        sys.stdin.readline()
except SdoptError as error:
    print(error, flush=True)
    raise SystemExit(3)
"""


def writer(target: Path, word: str, *more: str) -> subprocess.Popen[str]:
    """A process that fills a folder, says "ready", and ends it when it is sent a line."""
    command = [sys.executable, "-c", WRITER, str(target), word, *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def bundle_of(target: Path, word: str) -> Path:
    target.mkdir(parents=True)
    (target / "manifest.json").write_text('{"format_version": 0}')
    (target / "who").write_text(word)
    return target


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("more", [(), ("force",)], ids=["new", "force"])
def test_the_second_writer_of_a_name_is_refused_at_the_start_and_the_first_one_loses_nothing(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    if more:
        bundle_of(tmp_path / "b", "old")
    first = writer(tmp_path / "b", "first", *more)
    assert first_line(first) == "ready\n"
    second = writer(tmp_path / "b", "second", *more)
    assert "is being written by another process" in first_line(second)
    assert second.wait(60) == 3
    first.communicate("\n", 60)
    assert first.returncode == 0
    assert (tmp_path / "b/who").read_text() == "first"
    assert names(tmp_path) == ["b"]


def test_two_threads_are_two_writers(tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "b"),
        pytest.raises(BundleError, match="being written by another process"),
        new_folder(tmp_path / "b"),
    ):
        pass
    assert names(tmp_path) == ["b"]


def test_what_a_killed_writer_left_goes_with_the_next_one_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    dead, other = writer(tmp_path / "b", "dead"), writer(tmp_path / "other", "other")
    assert [first_line(process) for process in (dead, other)] == ["ready\n"] * 2
    dead.kill()
    dead.wait()
    assert len(list(tmp_path.glob(".b.tmp-*"))) == 1
    (tmp_path / ".b.tmp-mine").mkdir()  # is not named as sdopt names them
    with new_folder(tmp_path / "b"):
        assert len(list(tmp_path.glob(".b.tmp-*"))) == 2
    other.communicate("\n", 60)
    assert names(tmp_path) == [".b.tmp-mine", "b", "other"]


def test_where_there_are_no_locks_what_is_a_day_old_goes_and_the_second_writer_is_refused_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    old, young = tmp_path / ".b.tmp-01234567", tmp_path / ".b.tmp-89abcdef"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    with (
        pytest.raises(BundleError, match=r"b has been made by somebody else meanwhile|b exists already"),
        new_folder(tmp_path / "b"),
    ):
        bundle_of(tmp_path / "b", "other")
    assert names(tmp_path) == [young.name, "b"]
    assert (tmp_path / "b/who").read_text() == "other"


def test_the_name_is_never_taken_from_what_came_meanwhile(tmp_path: Path) -> None:
    for came in ("folder", "file"):
        target = tmp_path / came
        with unfinished(target) as folder:
            (folder / "x").touch()
            bundle_of(target, "other") if came == "folder" else target.write_text("other")
            with pytest.raises(BundleError, match="made by somebody else meanwhile"):
                put_in_place(folder, target, replace=False)
        assert target.is_file() or (target / "who").read_text() == "other"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names here")
def test_a_bundle_is_replaced_in_one_step(tmp_path: Path) -> None:
    """A reader that looks all the time sees the old one or the new one, and never none."""
    target = bundle_of(tmp_path / "b", "0")
    code = "import sys, os\nwhile True:\n    open(sys.argv[1] + '/manifest.json').close()\n"
    reader = subprocess.Popen([sys.executable, "-c", code, str(target)], stderr=subprocess.PIPE, text=True)
    for i in range(200):
        with unfinished(target) as folder:
            (folder / "manifest.json").write_text(str(i))
            put_in_place(folder, target, replace=True)
    assert reader.poll() is None
    reader.kill()
    reader.communicate()
    assert names(tmp_path) == ["b"]


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "another")


def test_where_names_cannot_be_exchanged_a_bundle_is_replaced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_exchange(monkeypatch)
    target = bundle_of(tmp_path / "b", "old")
    with new_folder(target, force=True) as folder:
        (folder / "who").write_text("new")
    assert (names(tmp_path), (target / "who").read_text()) == (["b"], "new")


def test_an_old_bundle_that_a_killed_process_had_put_aside_comes_back(tmp_path: Path) -> None:
    bundle_of(tmp_path / ".b.old-01234567", "old")
    with pytest.raises(BundleError, match="exists already"), new_folder(tmp_path / "b"):
        pass
    assert (names(tmp_path), (tmp_path / "b/who").read_text()) == (["b"], "old")


def test_an_old_bundle_comes_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_exchange(monkeypatch)
    target = bundle_of(tmp_path / "b", "old")
    with unfinished(target) as folder:
        shutil.rmtree(folder)  # as if somebody had deleted it
        with pytest.raises(FileNotFoundError):
            put_in_place(folder, target, replace=True)
    assert (names(tmp_path), (target / "who").read_text()) == (["b"], "old")


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    real = bundle_of(tmp_path / "disk/b", "old")
    (tmp_path / "b").symlink_to(real)
    with new_folder(tmp_path / "b", force=True) as folder:
        (folder / "who").write_text("new")
    assert (tmp_path / "b").is_symlink()
    assert ((real / "who").read_text(), names(real.parent)) == ("new", ["b"])


def test_what_can_be_known_of_a_name_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "self").symlink_to("self")
    bundle_of(tmp_path / "b", "x")
    (tmp_path / "app").mkdir()
    (tmp_path / "app/manifest.json").write_text('{"name": "of a program"}')
    for name, force, kind, words in (
        ("file", True, BundleError, "exists already"),
        ("file/b", False, BundleError, "file is not a folder"),
        ("self", False, BundleError, "leads to itself|too many|exists already"),
        ("b", False, BundleError, "exists already"),
        ("b/../b", False, BundleError, "exists already"),
        ("app", True, BundleError, "not a bundle"),
        ("n" * 250, False, UsageError, "too long by 9 bytes"),
        ("a\0b", False, UsageError, "cannot be the name"),
        ("\ud800", False, UsageError, "cannot be the name"),
        (("n" * 200 + "/") * 30, False, UsageError, "cannot be the name|too long"),
    ):
        before = names(tmp_path)
        with pytest.raises(kind, match=words):
            check_target(tmp_path / name, force)
        assert names(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")
def test_a_place_that_this_user_may_not_write_is_refused_before_the_work(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    code = f"""
import os
from pathlib import Path
from sdopt.bundle.write import check_target
if os.geteuid() == 0:
    os.setuid(12345)
try:
    check_target(Path({str(closed / "deep" / "b")!r}), False)
except Exception as error:
    print(type(error).__name__, error)
"""
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("BundleError"), done.stderr
    assert f"the folder {closed} cannot be written" in done.stdout


def test_folders_above_that_were_made_for_a_bundle_go_with_it(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), new_folder(tmp_path / "a/b/c") as folder:
        assert folder.parent == tmp_path / "a/b"
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_disk_that_fills_loses_one_folder_and_says_so(small_disk: Path) -> None:
    bundle_of(small_disk / "b", "old")
    with (
        pytest.raises(BundleError, match=rf"b is not written: .*No space left on device; {small_disk} has .* free"),
        new_folder(small_disk / "b", force=True) as folder,
    ):
        (folder / "weights").write_bytes(bytes(8 << 20))
    assert (names(small_disk), (small_disk / "b/who").read_text()) == (["b"], "old")
    with (
        pytest.raises(BundleError, match=r"has 4\.1\d MB free, about 5\.00 MB needed"),
        new_folder(small_disk / "c", needed_bytes=5_000_000),
    ):
        pytest.fail("the work began")
    assert names(small_disk) == ["b"]


def test_a_mounted_disk_is_not_replaced(small_disk: Path) -> None:
    (small_disk / "manifest.json").write_text('{"format_version": 0}')
    with pytest.raises(BundleError, match="where a disk is mounted"):
        check_target(small_disk, True)


def test_the_lock_of_the_folder_around_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)
    began = time.monotonic()
    with locked(tmp_path) as is_ours, new_folder(tmp_path / "b"):
        assert is_ours
    assert time.monotonic() - began < 30
    assert names(tmp_path) == ["b"]


SCRATCH = """
import sys
from sdopt.bundle.unfinished import scratch
with scratch() as folder:
    (folder / "large").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_process_left_among_temporary_files_goes_with_the_next_one(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip
        return process, Path(first_line(process).strip())

    (living, its_own), (dead, left) = start(), start()
    assert its_own.stat().st_mode & 0o077 == 0
    dead.kill()
    dead.wait()
    assert (left / "large").is_file()
    last, third = start()
    assert set(tmp_path.iterdir()) == {its_own, third}
    for process in (living, last):
        process.communicate("\n", 60)
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []
