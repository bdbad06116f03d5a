"""One process builds an engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def one_builder(folder: Path, report: Callable[[str], None]) -> Generator[None]:
    """Hold the lock of an engine's key; the system releases it when a process ends, however it ends.

    The file of the lock is removed while the lock is held. A process that waited for that file sees that it is gone,
    and takes the lock of a new one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report(f"{folder.name}: another process is building it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open
            path.unlink()
        lock.release()
