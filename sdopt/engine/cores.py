"""How many cores this process may use, and so how many threads an engine should start."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """The cores that this process may use: those of the machine, less what affinity or a CPU quota takes away."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, _cgroup_quota())


def thread_limit() -> int:
    """The threads that an engine may start: 0 (the library's own choice) unless affinity or a quota limits them.

    ONNX Runtime starts a thread per physical core of the machine; in a container with a quota that is too many.
    """
    cores = usable_cores()
    return cores if cores < (os.cpu_count() or 1) else 0


def _cgroup_quota() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 1 << 30
