"""A Ray cluster, for those who have one, or of this machine's own processes.

    with connected() as ray:                     a new cluster of this machine; or that of RAY_ADDRESS where it is set
    with connected("10.0.0.1:6379") as ray:      one that runs; "auto" is the one that runs on this machine

A cluster that began with the block ends with it. Ray's usage report is off unless the user turned it on. Its token
authentication, which is on for new clusters, stays as it is, and so do RAY_AUTH_MODE and RAY_AUTH_TOKEN. Ray's
dashboard is not started.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdopt.errors import BackendError, UsageError, install, shown

USAGE = "RAY_USAGE_STATS_ENABLED"
NAMESPACE = "sdopt"
NEW = "local"  # Ray's word for a cluster of this machine that begins and ends with this process
ANY = "auto"  # Ray's word for the cluster that runs on this machine
LONGEST = 5.0  # seconds until an address has taken a connection


@contextmanager
def connected(address: str = "", *, cpus: int | None = None, quiet: bool = True) -> Generator[Any]:
    """Connect this process to a cluster while the block runs, and give the module `ray`.

    A process that is connected already stays so, also after the block. What the process does on SIGINT and SIGTERM
    stays as it was, if the block is in its main thread.
    address: HOST:PORT or "auto" for one that runs; empty for the one of RAY_ADDRESS, or else for a new one.
    cpus: how many a new cluster has; None: as many as the machine.
    quiet: what tasks and actors print stays in Ray's own logs.
    Raises: BackendError where ray is not installed or the cluster does not answer, UsageError for a wrong address.
    """
    address = address or os.environ.get("RAY_ADDRESS", "") or NEW
    if address not in (NEW, ANY):
        _refuse_silent(address)
    silence_usage()
    ray = ray_module()
    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": cpus} if address == NEW else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=not quiet, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and errors of its own
        what = "Ray does not start" if address == NEW else f"the Ray cluster at {address} does not answer"
        hint = "" if address == NEW else "; `ray start --head` starts one, and without an address sdopt starts its own"
        if address != NEW and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            hint += ". One with token authentication needs RAY_AUTH_MODE=token and its token here too"
        raise BackendError(f"{what}: {error}{hint}") from error
    try:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray's own ones end the process at once
                signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()


def silence_usage() -> None:
    """Turn Ray's usage report off in this process and its children, unless the user decided about it.

    The user's decision is the variable RAY_USAGE_STATS_ENABLED, or the file that `ray enable-usage-stats` writes.
    """
    file = os.environ.get("RAY_USAGE_STATS_CONFIG_PATH") or Path.home() / ".ray" / "config.json"
    try:
        decided = json.loads(Path(file).read_text(encoding="utf-8"))["usage_stats"] is True
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or not Ray's
        decided = False
    if not decided:
        os.environ.setdefault(USAGE, "0")


def ray_module(name: str = "ray") -> Any:
    """Ray, or one of its modules, such as "ray.serve". Raises: BackendError where it is not installed."""
    try:
        return importlib.import_module(name)  # late: an extra, which takes a second
    except ImportError as error:
        raise BackendError(f"this needs Ray ({error}): {install('ray')}") from error


def _refuse_silent(address: str) -> None:
    """Raises: UsageError for what is no HOST:PORT, BackendError where nothing listens there: Ray would wait long."""
    host, colon, port = address.rpartition(":")
    if "/" in address or not colon or not host or not port.isascii() or not port.isdigit() or int(port[:6]) > 65535:
        allowed = f'allowed are HOST:PORT, such as 10.0.0.1:6379, "{ANY}" and "{NEW}"'
        raise UsageError(f"address = {shown(address)}; {allowed}", "address")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LONGEST).close()
    except (OSError, UnicodeError) as error:
        text = f"the Ray cluster at {address} does not answer: {error}; `ray start --head --port {port}` starts one"
        raise BackendError(f"{text}, and without an address sdopt starts its own") from error
