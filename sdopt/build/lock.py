"""One process builds an engine at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def one_builder(folder: Path, report: Callable[[str], None]) -> Generator[None]:
    """Hold the lock of an engine's key; the system lets go of it when a process ends, however it ends.

    Its file is removed in the end. Whoever waited for that file then has the lock of nothing, and takes the new one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path, told = folder.parent / f".{folder.name}.lock", False
    while True:
        with path.open("w") as stream:
            if not _lock(stream, wait=False):
                if not told:
                    report(f"{folder.name}: another process is building it; waiting")
                told = True
                _lock(stream, wait=True)
            if not _is_at(stream, path):
                continue
            try:
                yield
            finally:
                with suppress(OSError):  # Windows keeps a file that is open
                    path.unlink()
            return


def _is_at(stream: Any, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(stream: Any, wait: bool) -> bool:
    if os.name == "nt":
        import msvcrt

        lock: Any = msvcrt
        try:
            lock.locking(stream.fileno(), lock.LK_LOCK if wait else lock.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
