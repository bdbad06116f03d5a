"""What an engine library made of a graph, kept for the next process: it loads sooner and takes less memory.

    ~/.cache/sdopt/loaded/unet-ort-5f0c91d2ab34/

There is one folder for each graph, weights, library, processor and options. Folders are readable by this user only.
A folder appears only when it is complete, and may be deleted at any time. When a new one is written, those that nobody
used for a month are deleted. If nothing can be written, the graph is loaded without the cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sdopt.bundle.disk import user_folder
from sdopt.bundle.files import Bundle, Component, new_folder
from sdopt.errors import BackendError, SdoptError

UNUSED_SECONDS = 30 * 24 * 3600
Loaded = TypeVar("Loaded")


def root() -> Path:
    """The folder of the cache, for all bundles of this user."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "loaded"


def available() -> bool:
    """Whether this user has a place for the cache."""
    try:
        root()
    except BackendError:
        return False
    return True


def nbytes() -> int:
    """The size of the cache on disk."""
    return sum(path.stat().st_size for path in root().rglob("*") if path.is_file())


def entry(bundle: Bundle, component: Component, backend: str, options: Mapping[str, Any]) -> Path:
    """The folder for what `backend` makes of this very graph and its weights, with `options`, on this processor."""
    graph = component.graph.name
    weights = f"{bundle.component(component.name).graph.name}.data"
    files = bundle.manifest.files
    digests = [files[name].sha256 for name in (graph, weights) if name in files]
    text = json.dumps([digests, processor(), options], sort_keys=True)
    return root() / f"{component.name}-{backend}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def load(
    folder: Path, needed_bytes: int, *, kept: Callable[[Path], Loaded], new: Callable[[Path | None], Loaded]
) -> Loaded:
    """`kept(folder)` if the folder can be read, else `new(folder to fill)`, or `new(None)` if none can be written.

    Raises: what `new(None)` raises.
    """
    if folder.is_dir():
        try:
            loaded = kept(folder)
        except SdoptError:  # damaged, or written by another build of the same version
            shutil.rmtree(folder, ignore_errors=True)
        else:
            with suppress(OSError):
                os.utime(folder)
            return loaded
    try:
        root().mkdir(parents=True, exist_ok=True, mode=0o700)
        with new_folder(folder, needed_bytes=needed_bytes) as temporary:
            loaded = new(temporary)
    except (OSError, SdoptError):
        return new(None)
    _forget_unused()
    return loaded


@functools.cache
def processor() -> str:
    """What this processor can do, as text: kernels are chosen by it, and weights are laid out for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system than Linux
        return f"{platform.machine()} {platform.processor()}"
    features = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return f"{platform.machine()} {sorted(set(features))}"


def _forget_unused() -> None:
    for folder in root().glob("*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
