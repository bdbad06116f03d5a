"""Why this process may not write into a folder, and what to type."""

from __future__ import annotations

import os
from pathlib import Path


def refusal(folder: Path) -> str:
    """Why no file can be made in a folder that exists; empty if one can."""
    if os.access(folder, os.W_OK | os.X_OK):
        return ""
    text = f"the folder {folder} cannot be written"
    if os.name == "nt":
        return text
    try:
        is_read_only, owner = bool(os.statvfs(folder).f_flag & os.ST_RDONLY), folder.stat().st_uid
    except OSError:  # below a folder that may not even be searched
        return text
    if is_read_only:
        return f"{text}: its file system is read-only"
    if owner == os.geteuid():
        return text
    with_user = 'in a container: start it with --user "$(id -u):$(id -g)"'
    return f"{text}: it belongs to user {owner}, and this process is user {os.geteuid()} ({with_user})"
