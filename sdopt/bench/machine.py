"""What a record says about its machine: everything that influences the timings. Nothing on the machine is changed."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sdopt import __version__
from sdopt.engine.cores import usable_cores

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "onnx",
    "onnx-ir", "tokenizers", "torch", "diffusers", "transformers",
)  # fmt: skip
GPU_FIELDS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "power.draw",
    "temperature.gpu", "pstate",
)  # fmt: skip
POLL_SECONDS = 0.1
T = TypeVar("T")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, and the load average of the last minute."""
    has_sysconf, has_load = hasattr(os, "sysconf"), hasattr(os, "getloadavg")  # Windows has neither
    return {
        "cpu": _cpu(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if has_sysconf else 0,
        "system": platform.system(),
        "release": platform.platform(),
        "architecture": platform.machine(),
        "load_before": round(os.getloadavg()[0], 2) if has_load else 0.0,
    }


def versions() -> dict[str, str]:
    """The versions of Python, of sdopt, and of the libraries that are installed."""
    installed = {"python": platform.python_version(), "sdopt": __version__}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """The git commit of this sdopt, with "+" when files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    head = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if head is None or _output("git", "-C", str(folder), "ls-files", "--error-unmatch", __file__) is None:
        return None
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return head.strip() + ("+" if changed else "")


def gpu() -> dict[str, str] | None:
    """The first GPU as nvidia-smi describes it; None without one."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits", "--id=0")
    rows = list(csv.reader((text or "").splitlines(), skipinitialspace=True))
    if not rows or len(rows[0]) != len(GPU_FIELDS):
        return None
    return dict(zip(GPU_FIELDS, rows[0], strict=True))


def device_bytes() -> int | None:
    """The memory of the first GPU that all processes together use; None without a GPU."""
    megabytes = _output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0")
    return int(megabytes) << 20 if megabytes and megabytes.strip().isdigit() else None


def with_peak_device_bytes(run: Callable[[], T]) -> tuple[T, int | None]:
    """(the result of `run`, how much the GPU's used memory grew at most while it ran; None without a GPU)

    The memory is read ten times a second.
    """
    before = device_bytes()
    if before is None:
        return run(), None
    readings, done = [before], threading.Event()

    def watch() -> None:
        while not done.is_set():
            readings.append(device_bytes() or 0)
            time.sleep(POLL_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return run(), max(readings) - before
    finally:
        done.set()
        watcher.join()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
