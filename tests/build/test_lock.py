"""One process at a time holds the lock of an engine, whatever becomes of the others."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from sdopt.build.lock import one_builder
from sdopt.errors import BackendError


def hold(folder: Path, lines: Any, release: Any) -> None:
    """Hold the lock of `folder` until `release` is set; "held" and "done" are put into `lines`."""
    with one_builder(folder, lines.put):
        lines.put("held")
        release.wait(60)
    lines.put("done")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "unet-0123"


def silent(line: str) -> None: ...


def test_a_free_lock_is_taken_without_a_word_and_leaves_no_file(folder: Path) -> None:
    lines: list[str] = []
    for _ in range(2):
        with one_builder(folder, lines.append):
            assert [path.name for path in folder.parent.iterdir()] == [".unet-0123.lock"]
        assert not [*folder.parent.iterdir()]
    assert lines == []


def test_a_build_that_fails_releases_the_lock(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), one_builder(folder, silent):
        raise RuntimeError("broken")
    with one_builder(folder, pytest.fail):
        pass


def test_others_wait_and_say_so_and_hold_it_one_after_the_other(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    lines, release = context.Queue(), context.Event()
    release.set()
    processes = [context.Process(target=hold, args=(folder, lines, release)) for _ in range(2)]
    with one_builder(folder, pytest.fail):
        for process in processes:
            process.start()
        waiting = [lines.get(timeout=60) for _ in processes]
        assert waiting == ["unet-0123: another process is building it; waiting"] * 2
        assert lines.empty()
    assert sorted(lines.get(timeout=60) for _ in range(4)) == ["done", "done", "held", "held"]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert not [*folder.parent.iterdir()]


def test_who_waited_for_a_file_that_is_gone_shares_its_lock_with_nobody(folder: Path) -> None:
    inside: list[int] = []
    most = Event()

    def build() -> None:
        for _ in range(20):
            with one_builder(folder, silent):
                inside.append(1)
                if len(inside) > 1:
                    most.set()
                inside.pop()

    threads = [Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not most.is_set()


def test_a_process_that_was_killed_holds_no_lock(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    lines, never = context.Queue(), context.Event()
    process = context.Process(target=hold, args=(folder, lines, never))
    process.start()
    assert lines.get(timeout=60) == "held"
    process.kill()
    process.join(60)
    with one_builder(folder, pytest.fail):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_where_there_are_no_locks_the_work_is_done_and_a_line_says_so(
    folder: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", unsupported)
    lines: list[str] = []
    done: list[bool] = []
    with one_builder(folder, lines.append):
        done.append(True)
    assert done == [True]
    assert len(lines) == 1
    assert "has no locks" in lines[0]


def test_a_folder_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="engines cannot be written"), one_builder(tmp_path / "file/x", silent):
        pass
