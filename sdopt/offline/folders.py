"""Folders of pictures: on a disk, or in an object store such as s3://bucket/pictures.

A file appears complete or not at all: on a disk by one rename, in a store when its upload is closed.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from sdopt.bundle.disk import read_given, remove_leftovers, write_whole
from sdopt.errors import BackendError, UsageError, install
from sdopt.logs import logger

log = logger(__name__)
MAX_BYTES = 1 << 30  # of a list, or of a picture that a line names
OLDER = "older"  # the folder in a folder for pictures of lines that were changed
LOCK = ".sdopt-batch.lock"
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://", re.IGNORECASE)
SIGNATURE, END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"  # Ref: PNG (Third Edition), 5.2, 11.2.5


class Folder(Protocol):
    """A folder. Names are relative to it. Each method raises OSError."""

    def names(self) -> set[str]:
        """The names of the files in it; none where it is not there."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file, which may be named by a whole path too."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, complete or not at all; one of this name is replaced."""
        ...

    def set_aside(self, name: str) -> None:
        """Move a file into the folder `OLDER` in this one. A file that is gone is no error."""
        ...

    def is_complete(self, name: str) -> bool:
        """Whether a PNG begins and ends as one, which a copy that was cut off does not."""
        ...


class Disk:
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> set[str]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return set()
        except NotADirectoryError as error:
            raise UsageError(f"{self.path} is no folder; name a folder for the pictures") from error

    def read(self, name: str) -> bytes:
        return read_given(self.path / name, MAX_BYTES)

    def write(self, name: str, content: bytes) -> None:
        write_whole(self.path / name, content)

    def set_aside(self, name: str) -> None:
        with suppress(FileNotFoundError):
            (self.path / OLDER).mkdir(exist_ok=True)
            os.replace(self.path / name, self.path / OLDER / name)

    def is_complete(self, name: str) -> bool:
        with suppress(FileNotFoundError), open(self.path / name, "rb") as stream:
            begins = stream.read(len(SIGNATURE)) == SIGNATURE
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - len(END)))
            return begins and stream.read() == END
        return False


class Store:
    """A folder in an object store, through the file systems of pyarrow and fsspec, which Ray Data takes too."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._base = _file_system(self.url)

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    def names(self) -> set[str]:
        fs: Any = importlib.import_module("pyarrow.fs")
        listed = self._files.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
        return {str(info.base_name) for info in listed if info.type == fs.FileType.File}

    def read(self, name: str) -> bytes:
        if URL.match(name):
            files, path = _file_system(name)
        else:
            files, path = self._files, f"{self._base}/{name}"
        with files.open_input_file(path) as stream:
            if stream.size() > MAX_BYTES:
                raise OSError(f"{name} has {stream.size()} bytes; allowed are {MAX_BYTES}")
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        stream = self._files.open_output_stream(f"{self._base}/{name}")
        stream.write(content)
        stream.close()  # not where writing fails: closing would publish what was written

    def set_aside(self, name: str) -> None:
        self._files.create_dir(f"{self._base}/{OLDER}", recursive=True)
        with suppress(FileNotFoundError):
            self._files.move(f"{self._base}/{name}", f"{self._base}/{OLDER}/{name}")

    def is_complete(self, name: str) -> bool:
        with suppress(FileNotFoundError), self._files.open_input_file(f"{self._base}/{name}") as stream:
            size = stream.size()
            begins = stream.read(len(SIGNATURE)) == SIGNATURE
            stream.seek(max(0, size - len(END)))
            return begins and bytes(stream.read()) == END
        return False


def is_url(text: str) -> bool:
    """Whether a text names a place in an object store, and not on a disk."""
    match = URL.match(text)
    return match is not None and match["scheme"].lower() != "file"


def folder(text: str) -> Folder:
    """The folder of a path or a URL. Raises: UsageError for a store that is not known, BackendError without pyarrow."""
    return Store(text) if is_url(text) else Disk(local(text))


def local(text: str) -> Path:
    """The path of a text that is no object store's; file:// may stand before it."""
    return Path(text[len("file://") :]) if text.lower().startswith("file://") else Path(text)


def parent(text: str) -> tuple[str, str]:
    """The folder of a file, as a path or a URL, and the file's name."""
    if is_url(text):
        above, _, name = text.rpartition("/")
        return above, name
    path = local(text)
    return str(path.parent), path.name


def check(target: Folder) -> None:
    """Raises: UsageError for a folder that cannot be made or written. Nothing is made yet."""
    if not isinstance(target, Disk):
        return
    try:
        above = target.path.absolute()
        while not os.path.lexists(above):
            above = above.parent
        if not above.is_dir():
            raise NotADirectoryError(f"{above} is no folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(f"{above} cannot be written")
    except (OSError, ValueError) as error:
        raise UsageError(f"{target}: no pictures can be written there: {error}; name another folder") from error


def make(target: Folder) -> None:
    """Make a folder for pictures, and remove what a killed process left half-written in it.

    Raises: UsageError where none can be made.
    """
    if isinstance(target, Store):
        return  # there are no folders in a store
    assert isinstance(target, Disk)
    try:
        target.path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{target}: no pictures can be written there: {error}; name another folder") from error
    remove_leftovers(target.path)


@contextmanager
def alone(target: Folder) -> Generator[None]:
    """Hold the lock of a folder on a disk while the block runs. The system releases it where the process is killed.

    Without locks, as in an object store, two runs make the same pictures twice, and each replaces one equal file.
    Raises: UsageError where another process holds it.
    """
    if not isinstance(target, Disk):
        yield
        return
    path = target.path / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            is_held = _lock(descriptor, target)
            with suppress(FileNotFoundError):
                if not is_held or os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break  # else another run has removed this file meanwhile
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
        os.close(descriptor)


def _lock(descriptor: int, target: Disk) -> bool:
    """Lock an open file. Whether the system has locks at all."""
    try:
        import fcntl  # late: Windows has none

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{target}: another run writes to this folder; wait until it ends, or name another folder. "
            "--workers N uses several processes in one run"
        ) from error
    except (ImportError, OSError) as error:
        log.info("%s has no locks: %s", target, error)
        return False
    return True


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        fs: Any = importlib.import_module("pyarrow.fs")  # optional, so its types may be absent
    except ImportError as error:
        raise BackendError(f"{url}: object stores need pyarrow ({error}): {install('ray')}") from error
    try:
        files, path = fs.FileSystem.from_uri(url)
        return files, str(path)
    except ValueError as unknown:  # of pyarrow's own; fsspec knows more
        scheme, _, path = url.partition("://")
        try:
            fsspec: Any = importlib.import_module("fsspec")
            return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme))), path
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: {unknown}; {error}. Allowed are paths, s3:// and gs:// addresses") from error
