"""Folders that take their name when they are complete, and what processes that died have left of them.

    .sd15.tmp-1f2e3d4c    is being written, by the process that holds its lock, or is being deleted
    .sd15.old-5a6b7c8d    was `sd15` until a moment ago, where the system cannot exchange two names

with unfinished(target) as folder:
    ...                                         # fill `folder`
    put_in_place(folder, target, replace=True)

The lock is one that the system releases when its process ends, however it ends. So whoever comes next can tell what is
left over from what is being written. Making a folder and taking its lock are one step for others: both happen under the
lock of the folder around it, which is held for no longer than that.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sdopt.errors import BundleError

LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}", re.DOTALL)
ADDED_BYTES = len(".") + len(".tmp-01234567")  # what a name becomes longer by
SCRATCH = "sdopt-scratch"
WAIT_SECONDS = 5.0  # for the lock of the folder around; a program that holds it for longer is none of ours
STALE_SECONDS = 24 * 3600  # where the file system has no locks, older unfinished folders are left over


@contextmanager
def unfinished(target: Path, *, alone: bool = False, mode: int = 0o777) -> Generator[Path]:
    """A new folder beside `target`. At the end it is deleted, unless the block has put it in its place.

    What processes that died have left of `target` goes first.
    Raises: OSError; with `alone`, BundleError if another process, or another thread, is writing `target`.
    """
    with ExitStack() as held:
        with locked(target.parent, WAIT_SECONDS):
            living = _remove_leftovers(target.parent, target.name)
            if alone and living:
                raise BundleError(f"{target} is being written by another process; wait for it, or choose another name")
            temporary = _aside(target, "tmp")
            temporary.mkdir(mode=mode)
            held.enter_context(locked(temporary))
        try:
            yield temporary
        finally:
            if os.path.lexists(temporary):
                _delete_now(temporary)


@contextmanager
def scratch() -> Generator[Path]:
    """A new folder for this process alone, in the system's folder for temporary ones (TMPDIR); deleted at the end.

    What processes that died have left of theirs goes first. Raises: OSError.
    """
    with unfinished(_scratch_target(), mode=0o700) as folder:
        yield folder


def remove_dead_scratch() -> None:
    """Delete what `scratch` of processes that died has left. No work fails where that cannot be done."""
    target = _scratch_target()
    with suppress(OSError):
        if any(target.parent.glob(f".{target.name}.tmp-*")):
            with locked(target.parent, WAIT_SECONDS):
                _remove_leftovers(target.parent, target.name)


def _scratch_target() -> Path:
    import tempfile  # late: a start that reads bundles alone needs no such folder

    user = os.getuid() if hasattr(os, "getuid") else 0  # Windows has such a folder for each user
    return Path(tempfile.gettempdir()).resolve() / f"{SCRATCH}-{user}"


def put_in_place(folder: Path, target: Path, *, replace: bool) -> None:
    """Give an unfinished folder the name of its target. With `replace`, what has this name is deleted afterwards.

    At every moment one of the two has the name. Where the system cannot exchange two names, there is none for an
    instant; a process that is killed then leaves the old one beside it, and the next one restores it.
    Raises: OSError; BundleError without `replace` if there is something under that name. Then nothing has changed.
    """
    if not replace or not os.path.lexists(target):
        _rename_to_free(folder, target)
    elif _exchanged(folder, target):
        _delete_now(folder)  # the old one has this name now
    else:
        old = _aside(target, "old")
        target.rename(old)
        try:
            folder.rename(target)
        except BaseException:
            old.rename(target)
            raise
        _delete_now(old)
    with suppress(OSError):  # a file system on which folders cannot be synchronized
        fsync(target.parent)


def delete(path: Path) -> None:
    """Delete a folder, or what stands in its place, which first gives its name free. Links are not followed.

    Raises: OSError if it cannot be renamed; FileNotFoundError if it is gone.
    """
    aside = _aside(path, "tmp")
    path.rename(aside)
    _delete_now(aside)


def remove_leftovers(parent: Path) -> None:
    """Delete what processes that died while they wrote, or deleted, have left in a folder of which all is sdopt's."""
    if not any(LEFTOVER.fullmatch(name) for name in os.listdir(parent)):
        return
    with locked(parent) as is_ours:
        if is_ours is not False:
            _remove_leftovers(parent)


@contextmanager
def locked(folder: Path, seconds: float = 0.0) -> Generator[bool | None]:
    """Hold the lock of a folder, for which this waits so long. The system releases it when this process ends.

    Gives True; False if somebody else holds it; None where the system or the file system has no such locks.
    """
    try:
        import fcntl  # late: Windows has none

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (ImportError, PermissionError):
        yield None
        return
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours: bool | None = True
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.01)
                    continue
                is_ours = False
            except OSError:
                is_ours = None
            break
        yield is_ours
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.urandom(4).hex()}")


def _remove_leftovers(parent: Path, name: str | None = None) -> list[Path]:
    """Delete what is left over, of the target `name` or of all, and restore what was to be replaced.

    The caller has the lock of `parent`. Returns those that other processes are writing.
    """
    living: list[Path] = []
    for path in list(parent.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        with suppress(OSError):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                continue
            with locked(path) as is_ours:
                if is_ours is False:
                    living.append(path)
                elif is_ours or time.time() - _last_change(path) > STALE_SECONDS:
                    _restore_or_delete(path, parent / match["name"], match["kind"])
    return living


def _restore_or_delete(path: Path, target: Path, kind: str) -> None:
    if kind == "old" and not os.path.lexists(target):
        path.rename(target)
    else:
        _delete_now(path)


def _last_change(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _delete_now(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    import shutil  # late: few processes delete anything

    shutil.rmtree(path, ignore_errors=True)


def _rename_to_free(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)  # a folder that has something in it is never replaced, nor is a file
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise BundleError(f"{target} has been made by somebody else meanwhile; choose another name") from error


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step. Whether the system and the file system can.

    Ref: Linux, renameat2(2), RENAME_EXCHANGE.
    """
    if sys.platform != "linux":
        return False
    import ctypes  # late: only what replaces a folder needs it

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    text, integer, flags = ctypes.c_char_p, ctypes.c_int, ctypes.c_uint
    renameat2.argtypes = (integer, text, integer, text, flags)
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):  # an old kernel, another file system, a sandbox
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
