"""The files that a command writes: checked before the work."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdopt.bundle.disk import real_path, refuse_read_only
from sdopt.bundle.permission import refusal
from sdopt.errors import UsageError

TEMPORARY = 10  # characters that `write_whole` adds to a name while it writes
NAME_MAX = 255  # bytes of a file's name, on nearly all file systems
PREVIEW = "-step-{:03}"


def check_folder(path: Path, flag: str = "-o") -> None:
    """Raises: UsageError if no file can be made beside `path`."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if why := refusal(path.parent):
        raise UsageError(f"{flag} {path}: {why}; name another one")


def check_file(path: Path, flag: str = "-o", *, example: str = "apple.png", make_folder: bool = False) -> None:
    """Raises: UsageError if `path` cannot be written, or is something else than a file.

    `make_folder`: its folder may be absent, since the command makes it.
    """
    try:
        name = os.fsencode(path.name)
    except ValueError as error:  # half of a surrogate pair
        raise UsageError(f"{flag} {path}: it cannot be a file: {error}") from error
    longest = len(name) + len(PREVIEW.format(0)) + TEMPORARY
    if longest > NAME_MAX:
        raise UsageError(f"{flag} {path}: this name is too long by {longest - NAME_MAX} bytes; take a shorter one")
    above = path.absolute()
    while make_folder and not os.path.lexists(above.parent):
        above = above.parent
    check_folder(above if make_folder else path, flag)
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a file where a folder would be, a name that is too long, a null byte
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{flag} {path}: it cannot be a file: {reason}") from error
    if path.is_symlink():
        return _check_link(path, flag, example)
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; name a file, e.g. {path / example}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag} {path} is a device or a pipe; name a file")
    try:
        refuse_read_only(path)
    except PermissionError as error:
        text = "the file is read-only; name another one, or let it be written"
        raise UsageError(f"{flag} {path}: {text}: chmod u+w {shlex.quote(str(path))}") from error


def _check_link(path: Path, flag: str, example: str) -> None:
    """Raises: UsageError for a link that leads to itself, or to where no file can be written."""
    try:
        real = real_path(path)
    except OSError as error:
        raise UsageError(f"{flag} {path} is a link that leads to itself; name a file") from error
    check_file(real, flag, example=example)


def check_pictures(paths: Iterable[Path], no_clobber: bool) -> None:
    """Raises: UsageError for a path that cannot be written, and with `no_clobber` for one that is there."""
    from sdopt.image.files import format_of

    for path in paths:
        if path == Path("-"):
            raise UsageError("-o -: pictures are not written to stdout; name a file, e.g. -o apple.png", "output")
        check_file(path)
        format_of(path)
        if no_clobber and os.path.lexists(path):
            raise UsageError(f"-o {path} exists, and --no-clobber keeps it; name another file")


def check_space(paths: Sequence[Path], width: int, height: int) -> None:
    """Raises: UsageError if a disk has less room than the pictures may take; one takes at most its pixels."""
    from sdopt.image.files import format_of

    for path in paths:
        format_of(path, width, height)
    needed = len(paths) * 3 * width * height
    free = shutil.disk_usage(real_path(paths[0]).parent).free
    if free < needed:
        raise UsageError(
            f"-o {paths[0]}: {len(paths)} pictures may take {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; "
            "free some space, or write to another disk"
        )
