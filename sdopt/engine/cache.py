"""What an engine library made of a graph, kept for the next process: it loads sooner and takes less memory.

    ~/.cache/sdopt/loaded/unet-ort-5f0c91d2ab34/
        record.json     the size and the SHA-256 of every other file
        graph.onnx      or whatever the library writes

There is one folder for each graph, weights, library, processor and options. It is read only if this user alone can have
written it and every file is what its record says; else it is made anew. Nothing is kept of a bundle whose hashes were
not compared. A folder appears only when it is complete, and may be deleted at any time. What a process that died left
behind goes at the next start, and what nobody used for a month goes when something new is written. If nothing can be
kept, the graph is loaded without the cache.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sdopt.bundle.decode import decode, encode
from sdopt.bundle.disk import is_private, parse_json, read_plain, user_folder
from sdopt.bundle.files import Component, ModelFolder
from sdopt.bundle.format import File, data_file
from sdopt.bundle.stamps import known_sha256, sha256
from sdopt.bundle.unfinished import delete, locked, put_in_place, remove_leftovers, unfinished
from sdopt.errors import BackendError, BundleError, SdoptError

RECORD = "record.json"
MAX_RECORD_BYTES = 1 << 16
UNUSED_SECONDS = 30 * 24 * 3600
PATIENCE = 300.0  # seconds in which another process that makes an entry should be done
Loaded = TypeVar("Loaded")


def root() -> Path:
    """The folder of the cache, for all bundles of this user.

    Raises: BackendError if this user has none.
    """
    return user_folder("XDG_CACHE_HOME", ".cache") / "loaded"


def usable(bundle: ModelFolder) -> bool:
    """Whether what a library makes of a bundle may be kept: its hashes were compared, and this user has a place."""
    return bundle.verified and _own_root() is not None


def nbytes() -> int:
    """The size of the cache on disk; 0 where it cannot be read."""
    total = 0
    with suppress(OSError, BackendError):
        for path in root().rglob("*"):
            with suppress(OSError):  # another process deletes it
                total += path.lstat().st_size if path.is_file() else 0
    return total


def remove(path: Path) -> bool:
    """Remove an entry of the cache, or what stands in its place. Whether it is gone: what is being written stays.

    Raises: OSError if it cannot be removed.
    """
    with suppress(FileNotFoundError):  # another process has removed it
        if path.is_dir() and not path.is_symlink():
            with locked(path) as is_ours:
                if is_ours is False:
                    return False
        delete(path)
    return True


def entry(bundle: ModelFolder, component: Component, backend: str, options: Mapping[str, Any]) -> Path:
    """The folder for what `backend` makes of this very graph and its weights, with `options`, on this processor."""
    graph, files = component.graph.name, bundle.manifest.files
    weights = data_file(bundle.manifest.components, component.name)
    digests = [files[name].sha256 for name in (graph, weights) if name in files]
    text = json.dumps([digests, processor(), options], sort_keys=True)
    return root() / f"{component.name}-{backend}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def load(
    bundle: ModelFolder,
    component: str,
    folder: Path,
    *,
    kept: Callable[[Path], Loaded],
    new: Callable[[Path | None], Loaded],
) -> Loaded:
    """`kept(folder)` if the folder is sound, else `new(folder to fill)`, or `new(None)` if none can be written.

    Raises: what `new(None)` raises.
    """
    with suppress(OSError):
        remove_leftovers(folder.parent)
    if is_sound(folder, bundle.paranoid):
        with suppress(SdoptError):  # written by another build of the same version
            loaded = kept(folder)
            with suppress(OSError):
                os.utime(folder)
            return loaded
    made: list[Loaded] = []
    try:
        with ExitStack() as stack:
            temporary = _begun(stack, folder, 2 * bundle.nbytes(component), bundle.paranoid)
            if temporary is None:
                return kept(folder)
            made.append(new(temporary))
            bundle.refuse_changed(component)  # the key is that of the files as they were
    except (OSError, SdoptError):
        return made[0] if made else new(None)
    _forget_unused(folder.parent)
    return made[0]


@functools.cache
def processor() -> str:
    """What this processor can do, as text: kernels are chosen by it, and weights are laid out for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system than Linux
        return f"{platform.machine()} {platform.processor()}"
    features = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return f"{platform.machine()} {sorted(set(features))}"


def _own_root() -> Path | None:
    """The cache's folder, made if it is not there; None where this user has none, or not alone."""
    try:
        folder = root()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if is_private(folder) and os.access(folder, os.R_OK | os.W_OK | os.X_OK) else None
    except (OSError, BackendError):
        return None


def is_sound(folder: Path, paranoid: bool) -> bool:
    """Whether this user alone can have written the folder, and its files are those of its record."""
    try:
        names = set(os.listdir(folder))
        if not all(is_private(path) for path in (folder, *(folder / name for name in names))):
            return False
        content = parse_json(read_plain(folder / RECORD, MAX_RECORD_BYTES))
        files: Mapping[str, File] = decode(Mapping[str, File], content, RECORD)
        return names == {RECORD, *files} and all(_is(folder / name, files[name], paranoid) for name in files)
    except (OSError, ValueError):
        return False


def _is(path: Path, file: File, paranoid: bool) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and known_sha256(path, paranoid) == file.sha256


def _begun(stack: ExitStack, folder: Path, needed_bytes: int, paranoid: bool) -> Path | None:
    """A new entry to fill, which ends with the stack; None where another process has filled it meanwhile.

    While another process, or another thread, fills it, this waits up to `PATIENCE` seconds: processes that start
    together do the work once, and one that hangs holds up nobody for ever.
    Raises: OSError, as `_new_entry`.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(BundleError):
            return stack.enter_context(_new_entry(folder, needed_bytes, alone=True))
        time.sleep(0.05)
        if is_sound(folder, paranoid):
            return None
    return stack.enter_context(_new_entry(folder, needed_bytes, alone=False))


@contextmanager
def _new_entry(folder: Path, needed_bytes: int, alone: bool) -> Generator[Path]:
    """A folder that takes the name of `folder`, with its record, when the block ends well.

    Raises: OSError, also where the disk has less than 1.2 times `needed_bytes`; nothing is left then. With
    `alone`, BundleError if somebody else is filling it.
    """
    import shutil  # late: only the first process on a machine writes

    if shutil.disk_usage(folder.parent).free < 1.2 * needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent))
    with unfinished(folder, alone=alone, mode=0o700) as temporary:
        yield temporary
        files: dict[str, File] = {}
        for path in temporary.iterdir():
            path.chmod(0o600)
            files[path.name] = File(path.stat().st_size, sha256(path))
        (temporary / RECORD).write_text(json.dumps(encode(files)), encoding="utf-8")
        (temporary / RECORD).chmod(0o600)
        put_in_place(temporary, folder, replace=True)


def _forget_unused(top: Path) -> None:
    for folder in top.glob("[!.]*"):
        with suppress(OSError):
            if time.time() - folder.lstat().st_mtime > UNUSED_SECONDS:
                delete(folder)
