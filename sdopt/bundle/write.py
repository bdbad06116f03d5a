"""Writing a bundle, or a folder in it, whole: it takes its name by one rename, when all of it is there.

with new_folder(target) as folder:
    ...                                # fill `folder`
    write_manifest(folder, manifest)   # last
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sdopt.bundle import adapter
from sdopt.bundle.disk import bytes_text
from sdopt.bundle.files import MANIFEST, MAX_MANIFEST_BYTES
from sdopt.bundle.format import File, Manifest
from sdopt.bundle.manifest import to_json
from sdopt.bundle.permission import refusal
from sdopt.bundle.stamps import sha256
from sdopt.bundle.unfinished import ADDED_BYTES, fsync, put_in_place, unfinished
from sdopt.errors import BundleError, UsageError

AnyManifest = TypeVar("AnyManifest", Manifest, adapter.AdapterManifest)
NAME_MAX = 255  # bytes of a file's name, on nearly all file systems
KEYS = (b'"format_version"', b'"adapter_version"')  # of a bundle's manifest, and of an adapter's
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_target(target: Path, force: bool) -> Path:
    """The folder that `target` names, without links, after a check that it can be made, or replaced with `force`.

    Raises: UsageError for a name that no folder can have; BundleError if there is something under it that is not to be
    replaced, or if this user may not write there.
    """
    path = _named(target, force)
    folder = next(folder for folder in path.parents if os.path.lexists(folder))
    if why := refusal(folder):
        raise BundleError(f"{path} cannot be made: {why}; choose another place")
    return path


def _named(target: Path, force: bool) -> Path:
    """As `check_target`, but for permissions, which the system knows best when the folder is made."""
    try:
        path = Path(os.path.realpath(target))
        longest = len(os.fsencode(path.name)) + ADDED_BYTES
        if longest > NAME_MAX:
            raise UsageError(f"{target}: this name is too long by {longest - NAME_MAX} bytes; take a shorter one")
        if os.path.islink(path):
            raise BundleError(f"{target} is a link that leads to itself; choose another name")
        _refuse_existing(path, force)
        folder = next(folder for folder in path.parents if os.path.lexists(folder))
        if not folder.is_dir():
            raise BundleError(f"{path} cannot be made: {folder} is not a folder; choose another place")
        with suppress(FileNotFoundError):
            os.lstat(f"{path}{' ' * ADDED_BYTES}")  # its path may be too long for the system
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{os.fspath(target)!r} cannot be the name of a folder: {error}") from error
    return path


@contextmanager
def new_folder(target: Path, *, force: bool = False, needed_bytes: int = 0) -> Generator[Path]:
    """A temporary folder beside `target` that takes its name, by one rename, when the block ends well.

    A block that raises, or a process that is killed, leaves nothing under the name of `target`.
    Raises: as `check_target`, and BundleError if another process is writing `target`, if the disk has less than
    `needed_bytes`, and in place of every OSError of the block.
    """
    path = _named(target, force)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with _in_words(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished(path, alone=True) as temporary:
                _refuse_existing(path, force)  # one that a killed process had put aside is back
                require_space(path.parent, needed_bytes)
                yield temporary
                for file in (*(p for p in temporary.rglob("*") if p.is_file()), temporary):
                    fsync(file)
                _refuse_existing(path, force)
                put_in_place(temporary, path, replace=force)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises: BundleError if the disk of `folder` has less room than this."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise BundleError(
            f"{folder} has {bytes_text(free)} free, about {bytes_text(needed_bytes)} needed; "
            "free some space, or choose a place on another disk"
        )


def write_manifest(folder: Path, manifest: AnyManifest) -> AnyManifest:
    """Write the manifest of a finished folder, with the size and SHA-256 of every file in it; the manifest as written.

    Raises: BundleError for a manifest that could not be read again.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {p.relative_to(folder).as_posix(): File(p.stat().st_size, sha256(p)) for p in paths}
    manifest = replace(manifest, files=files)
    try:
        entry = adapter.to_json(manifest) if isinstance(manifest, adapter.AdapterManifest) else to_json(manifest)
        text = json.dumps(entry, indent=1, allow_nan=False)
    except ValueError as error:  # a DecodeError too
        raise BundleError(f"{folder / MANIFEST} cannot be written: {error}") from error
    if len(text) >= MAX_MANIFEST_BYTES:
        raise BundleError(f"{folder / MANIFEST} cannot be written: {len(text)} bytes, more than {MAX_MANIFEST_BYTES}")
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _refuse_existing(path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if not (force and path.is_dir()):
        raise BundleError(f"{path} exists already; choose another name, or replace a bundle with --force")
    if any(path.iterdir()) and not _looks_like_a_bundle(path):
        raise BundleError(f"{path} is a folder, but not a bundle; it is not replaced. Choose another name.")
    kept = sorted(entry.name for entry in (path / adapter.ADAPTERS).glob("[!.]*"))
    if kept:
        raise BundleError(
            f"{path} has adapters, which would be lost: {', '.join(kept)}. Move {path / adapter.ADAPTERS} away, "
            "and back when the new bundle is there"
        )
    if os.path.ismount(path):
        raise BundleError(f"{path} is where a disk is mounted, and cannot be replaced; choose a folder in it")


def _looks_like_a_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, sound or damaged; other programs have files of the name manifest.json too."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        content = stream.read(MAX_MANIFEST_BYTES)
        return any(key in content for key in KEYS) or any(folder.glob("*.onnx"))


@contextmanager
def _in_words(path: Path) -> Generator[None]:
    """Raises: BundleError in place of an OSError in the block."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        names = [os.fsdecode(name) for name in (error.filename,) if isinstance(name, (str, bytes))]
        reason = ": ".join([*names, error.strerror or str(error)])
        if error.errno in NOT_ALLOWED:
            raise BundleError(f"{path} is not written: {reason}. Choose a place that you may write") from error
        folder = next(folder for folder in path.parents if folder.exists())
        free = bytes_text(shutil.disk_usage(folder).free)
        raise BundleError(
            f"{path} is not written: {reason}; {folder} has {free} free. "
            "Free some space, or choose a place on another disk"
        ) from error
