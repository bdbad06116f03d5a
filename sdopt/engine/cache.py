"""What an engine library made of a graph, kept for the next process: it loads sooner and takes less memory.

    ~/.cache/sdopt/loaded/unet-ort-5f0c91d2ab34/

A folder for each graph and all that changes the result: weights, library, processor, options. They belong to this user
alone, appear whole or not at all, and may be deleted at any time; what nobody used for a month is deleted when
something new comes. Where nothing can be written the graph is loaded as ever.
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
    """Where all of it is, for all bundles of this user."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "loaded"


def available() -> bool:
    """Whether this user has a place for it."""
    try:
        root()
    except BackendError:
        return False
    return True


def nbytes() -> int:
    """How much of the disk it takes."""
    return sum(path.stat().st_size for path in root().rglob("*") if path.is_file())


def entry(bundle: Bundle, component: Component, backend: str, options: Mapping[str, Any]) -> Path:
    """The folder for what `backend` makes of this very graph and its weights, with `options`, on this processor."""
    graph, weights = component.graph.name, f"{bundle.component(component.name).graph.name}.data"
    files = bundle.manifest.files
    digests = [files[name].sha256 for name in (graph, weights) if name in files]
    text = json.dumps([digests, processor(), options], sort_keys=True)
    return root() / f"{component.name}-{backend}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def load(
    folder: Path, needed_bytes: int, *, kept: Callable[[Path], Loaded], new: Callable[[Path | None], Loaded]
) -> Loaded:
    """`kept(folder)` if it is there and can be read, else `new(a folder to fill)`, or `new(None)` where none can be.

    Raises: what `new(None)` raises.
    """
    if folder.is_dir():
        try:
            loaded = kept(folder)
        except SdoptError:  # of a library that was changed behind its version, or damaged
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
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return f"{platform.machine()} {sorted(set(told))}"


def _forget_unused() -> None:
    for folder in root().glob("*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
