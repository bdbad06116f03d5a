"""The SHA-256 of a file, computed once: a stamp in this user's cache remembers it for as long as the file is the same.

A file is the same if its path, inode, size and times of change are. A file that was changed less than two seconds
before it was read gets no stamp, since its times could not tell a second change. Whoever doubts that asks for every
hash to be computed: `paranoid=True`, `--paranoid`. The stamps of files that are gone
are removed when there are many, and those of files that nobody opened for long.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdopt.bundle.disk import read_cached, read_plain, user_folder, write_cached
from sdopt.errors import BackendError

MAX_STAMP_BYTES = 1 << 16
MAX_STAMPS = 1000
FRESH_NS = 2_000_000_000  # some file systems note times in steps of two seconds


def sha256(path: Path) -> str:
    """The hex digest of a file, computed from its bytes."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def known_sha256(path: Path, paranoid: bool = False) -> str:
    """The hex digest of a file, from its stamp if there is one and the file is the same."""
    if paranoid:
        return sha256(path)
    digest = stamped_sha256(path)
    if digest is not None:
        return digest
    identity, began = _identity(path), time.time_ns()
    digest = sha256(path)
    changed = max(identity["mtime_ns"], identity["ctime_ns"])
    stamp = _stamp(path)
    if stamp is not None and identity == _identity(path) and began - changed > FRESH_NS:
        _write(stamp, {"file": identity, "sha256": digest})
    return digest


def stamped_sha256(path: Path) -> str | None:
    """The hex digest that a stamp has for a file; None without a stamp, or where the file is another one by now."""
    stamp = _stamp(path)
    if stamp is None:
        return None
    try:
        kept = json.loads(read_cached(stamp, MAX_STAMP_BYTES))
        return str(kept["sha256"]) if kept["file"] == _identity(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_dead(stamp: Path) -> bool:
    """Whether the file of a stamp is gone, or the stamp is damaged. A stamp that this is wrong about is made again."""
    try:
        return not os.path.lexists(json.loads(read_plain(stamp, MAX_STAMP_BYTES))["file"]["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": os.path.abspath(path),
        "device": status.st_dev,
        "inode": status.st_ino,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _stamp(path: Path) -> Path | None:
    """The file of a stamp; None where this user has no home."""
    name = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    try:
        return user_folder("XDG_CACHE_HOME", ".cache") / "stamps" / name
    except BackendError:
        return None


def _write(stamp: Path, entry: dict[str, Any]) -> None:
    """A stamp that cannot be written costs time at the next start, and nothing else."""
    with suppress(OSError):
        write_cached(stamp, json.dumps(entry).encode(), MAX_STAMPS, _is_dead)
