"""Small files: JSON and TOML read strictly, files written by one rename, and the folders of this user."""

from __future__ import annotations

import errno
import glob
import importlib
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from sdopt.errors import BackendError

MAX_CACHED_BYTES = 1 << 30  # of one file that a library wrote for the next process
UNUSED_SECONDS = 90 * 24 * 3600  # what nobody read for so long goes
DAY = 24 * 3600

UNFINISHED = "sdopt-"  # in the name of a file that is being written, so that nobody else's is taken for one


def parse_json(text: str | bytes) -> Any:
    """JSON without duplicate keys, NaN and infinity.

    Raises: ValueError for anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str) -> Any:
    """TOML, which has a reader in Python from 3.11 on.

    Raises: ValueError for what is no TOML; BackendError where nothing reads it.
    """
    try:
        reader: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise BackendError("a TOML file needs Python 3.11 or newer, or tomli: pip install tomli") from error
    return reader.loads(text)


def read_plain(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes.

    Raises: OSError at once for a link, a pipe, a device, a larger file, or one that cannot be read.
    """
    _refuse_unplain(path, os.lstat(path), limit)
    with _opened(path, limit, "O_NOFOLLOW") as stream:
        return stream.read(os.fstat(stream.fileno()).st_size)


def read_given(path: Path, limit: int) -> bytes:
    """As `read_plain`, for a file that the user named, perhaps by a link."""
    with open_given(path, limit) as stream:
        return stream.read(os.fstat(stream.fileno()).st_size)


def open_given(path: str | os.PathLike[str], limit: int = sys.maxsize) -> BinaryIO:
    """A file that the user named, perhaps by a link, opened to be read.

    Raises: OSError at once for a pipe, on which this would wait for ever, a device, a folder, or a larger file.
    """
    _refuse_unplain(path, os.stat(path), limit)
    return _opened(path, limit)


def _opened(path: str | os.PathLike[str], limit: int, *more: str) -> BinaryIO:
    flags = sum(
        getattr(os, word, 0) for word in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", *more)
    )  # some systems lack some
    stream = os.fdopen(os.open(path, os.O_RDONLY | flags), "rb")
    try:
        _refuse_unplain(path, os.fstat(stream.fileno()), limit)  # it may be another file by now
    except BaseException:
        stream.close()
        raise
    return stream


def _refuse_unplain(path: str | os.PathLike[str], status: os.stat_result, limit: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is a link, a pipe or a device, and not a plain file")
    if status.st_size > limit:
        raise OSError(f"{path} has {status.st_size} bytes; allowed are {limit}")


def is_private(path: Path) -> bool:
    """Whether a file or a folder belongs to this user, nobody else may write it, and it is no link.

    Raises: OSError if it cannot be looked at.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return False
    if os.name == "nt":  # the folder of a user is closed to others there
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def write_whole(path: Path, content: str | bytes, mode: int | None = None) -> None:
    """Write a file by one rename, also where others write it meanwhile; text as UTF-8. Its folder must exist.

    `mode`: its permissions, where they are not those of a new file.
    What a process that was killed in the middle has left beside it is removed.
    Raises: OSError that names `path`, and no incomplete file stays.
    """
    remove_leftovers(path.parent, path.name)

    def name(temporary: Path) -> None:
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(path)

    _write(path, content, 0o666 if mode is None else mode, name)


def write_new(path: Path, content: Callable[[], bytes]) -> None:
    """As `write_whole`, for a file that this user alone may read; one that has this name already stays.

    `content` is called only if there is none.
    """
    remove_leftovers(path.parent, path.name)
    if os.path.lexists(path):
        return

    def name(temporary: Path) -> None:
        with suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()

    _write(path, content(), 0o600, name)


def _write(path: Path, content: str | bytes, mode: int, name: Callable[[Path], object]) -> None:
    """Write a complete temporary file beside `path`, which `name` then names; a dead writer's one has no lock."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{UNFINISHED}{os.urandom(4).hex()}")
    try:
        with _created(temporary, mode) as stream:
            is_locked = _lock(stream.fileno())
            stream.write(data)
            stream.flush()
            if not os.path.lexists(temporary):
                own = stream.fileno()  # with a folder's descriptor, here of no use, Python follows the link of /proc
                try:
                    os.link(f"/proc/self/fd/{own}", temporary, src_dir_fd=own, follow_symlinks=True)
                except OSError:  # a file system that gives names to no such files
                    with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as named:
                        named.write(data)
            if is_locked:  # until it has its name; the system releases the lock of a process that dies
                name(temporary)
        if not is_locked:  # Windows renames no open file
            name(temporary)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def write_named(path: Path, content: str | bytes) -> None:
    """As `write_whole`, for a file that the user named: a link is followed, and a file that is there keeps its mode.

    Raises: OSError, also for a file that is read-only, which is left as it is.
    """
    real = real_path(path)
    refuse_read_only(real)
    try:
        mode = stat.S_IMODE(real.stat().st_mode)
    except FileNotFoundError:
        mode = None
    write_whole(real, content, mode)


def real_path(path: Path) -> Path:
    """Where a path leads to, without links.

    Raises: OSError for a link that leads to itself.
    """
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real


def refuse_read_only(path: Path) -> None:
    """Raises: PermissionError for a file that nobody may write, or not this user, as programs that open it get it."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "the file is read-only", str(path))


def _created(path: Path, mode: int) -> BinaryIO:
    """A new file; one without a name where Linux can give it one afterwards, so that nobody sees it unlocked."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        with suppress(OSError):  # not every file system has files without names
            return os.fdopen(os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode), "wb")
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files in a folder whose writers are dead: those for the file `name`, or for any file."""
    if os.name == "nt":
        return
    for left in folder.glob(f".{'*' if name is None else glob.escape(name)}.{UNFINISHED}{'[0-9a-f]' * 8}"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                is_new = status.st_size == 0 and time.time() - status.st_mtime < 60  # its writer is about to lock it
                if stat.S_ISREG(status.st_mode) and not is_new and _lock(descriptor):
                    left.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether this process has the lock of an open file now: not if another has it, or where nothing has locks."""
    try:
        import fcntl  # late: Windows has none

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def read_cached(path: Path, limit: int) -> bytes:
    """The content of a file that only this user can have written, in a folder of which the same is true.

    Its time of change becomes the day of its last use, by which `write_cached` forgets files.
    Raises: OSError for any other.
    """
    if not (is_private(path.parent) and is_private(path)):
        raise OSError(f"{path} may have been written by another user")
    content = read_plain(path, limit)
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)
    return content


def write_cached(path: Path, content: bytes, most: int, is_dead: Callable[[Path], bool] = lambda path: False) -> None:
    """As `write_whole`, in a folder that is made for this user alone and keeps about `most` files.

    What was not used for long goes. Of too many, those go first of which `is_dead` is true, then those that were used
    least recently. Another process that uses one of them makes it again.
    Raises: OSError, also where the folder is not this user's alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_private(path.parent):
        raise OSError(f"{path.parent} can be written by other users")
    remove_leftovers(path.parent)  # of any name: a file of a cache may never be written again
    _write(path, content, 0o600, lambda temporary: temporary.replace(path))
    _forget(path.parent, most, is_dead)


def _forget(folder: Path, most: int, is_dead: Callable[[Path], bool]) -> None:
    kept: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process has removed it
            used = path.lstat().st_mtime
            if time.time() - used > UNUSED_SECONDS:
                path.unlink()
            else:
                kept.append((used, path))
    if len(kept) <= most:
        return
    dead = {path for _, path in kept if is_dead(path)}
    living = [path for _, path in sorted(kept) if path not in dead]
    too_many = max(0, len(living) - most * 3 // 4)  # a few at a time, since to list a folder takes time
    for path in (*dead, *living[:too_many]):
        with suppress(OSError):
            path.unlink()


def user_folder(variable: str, below_home: str) -> Path:
    """This user's folder of state or cache, as the XDG base directories name it: a relative path counts as none.

    Raises: BackendError where this user has none: no home folder, and no variable that names another.
    """
    base = os.environ.get(variable) or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    if base and Path(base).is_absolute():
        return Path(base) / "sdopt"
    try:
        home, reason = Path.home(), "its path is relative"
    except RuntimeError as error:
        home, reason = Path(), str(error)
    if not home.is_absolute():
        raise BackendError(
            f"this user has no home folder ({reason}): set HOME, or {variable}, to a folder that can be written"
        )
    return home / below_home / "sdopt"


def bytes_text(nbytes: int) -> str:
    """ "1.76 GB" """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key is given twice")
    return entries


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")
