"""Only one process at a time builds an engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sdopt.bundle.unfinished import delete
from sdopt.errors import BackendError


@contextmanager
def one_builder(folder: Path, report: Callable[[str], None], *, wait: bool = True) -> Generator[None]:
    """Hold the lock of one engine's folder. The system releases it when the process ends, even by a crash.

    The lock's file is removed while the lock is still held. A process that waited for it sees that the file is gone,
    and locks a new one. Where the file system has no locks, two processes may do the same work, and the engine of the
    last one stays: nothing else depends on the lock.
    Raises: BackendError if nothing can be written beside the folder; without `wait`, if another process holds the lock.
    """
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder.parent))
    except OSError as error:
        raise BackendError(
            f"{folder.parent}: engines cannot be written: {error.strerror}. Copy the bundle to a folder of your own"
        ) from error
    lock = _lock(path)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                raise BackendError(
                    f"{folder.name}: another process is building it; try again when that has ended"
                ) from None
            report(f"{folder.name}: another process is building it; waiting")
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # NFS, Lustre, gVisor
        report(f"{folder.name}: {folder.parent} has no locks ({error}); if another process builds it, both will")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove an open file
            path.unlink()
        lock.release()


def remove_engines(folders: Sequence[Path], report: Callable[[str], None]) -> None:
    """Remove engines: all of them, or none. One that another process removes meanwhile is gone too.

    Raises: BackendError if another process is building one of them; OSError if one cannot be removed.
    """
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(one_builder(folder, report, wait=False))
        for folder in folders:
            with suppress(FileNotFoundError):
                delete(folder)


def _lock(path: Path) -> FileLock:
    """The lock in a file: one that the system releases, and no mark that stays when its process is killed."""
    try:
        return FileLock(path, fallback_to_soft=False)
    except TypeError:  # an earlier filelock, which falls back to nothing
        return FileLock(path)
