"""Nothing of an export connects to the hub while it is offline, whatever was imported before.

huggingface_hub reads HF_HUB_OFFLINE once, when it is imported, and other libraries keep copies of what it read. So the
copies are set too. huggingface_hub 1 asks its own one before each request.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

VARIABLE = "HF_HUB_OFFLINE"
_lock = threading.Lock()
_users = 0  # blocks that are offline now, in all threads
_before: dict[str, Any] = {}  # module -> its copy, to be restored; "" -> the environment's


@contextmanager
def offline(wanted: bool) -> Generator[None]:
    """While the block runs, this process is offline for the hub, if that is `wanted`."""
    if not wanted:
        yield
        return
    global _users
    with _lock:
        if _users == 0:
            _set()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _restore()


def _set() -> None:
    importlib.import_module("huggingface_hub.constants")
    _before[""] = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"  # for what is imported from now on, and for child processes
    for name, module in list(sys.modules.items()):
        entries = getattr(module, "__dict__", {})  # asking a lazy module for an attribute would import more
        if VARIABLE in entries:
            _before[name] = entries[VARIABLE]
            entries[VARIABLE] = True


def _restore() -> None:
    variable = _before.pop("")
    if variable is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = variable
    was_offline = _before["huggingface_hub.constants"]
    for name, module in list(sys.modules.items()):
        entries = getattr(module, "__dict__", {})
        if VARIABLE in entries:  # one that was imported in the block has read the variable of the block
            entries[VARIABLE] = _before.get(name, was_offline)
    _before.clear()
