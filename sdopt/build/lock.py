"""One process builds an engine at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def one_builder(folder: Path, report: Callable[[str], None]) -> Generator[None]:
    """Hold the lock of an engine's key; the system lets go of it when a process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as stream:
        if not _lock(stream, wait=False):
            report(f"{folder.name}: another process is building it; waiting")
            _lock(stream, wait=True)
        yield


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
