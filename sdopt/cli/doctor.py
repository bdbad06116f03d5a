"""`sdopt doctor`: what this machine has, what it lacks, and which engine and precision `auto` takes on it, and why."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROBE = """
import sys, onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
print(onnxruntime.InferenceSession(sys.argv[1], options, providers=["CUDAExecutionProvider"]).get_providers()[0])
"""
# The first release whose CUDA provider has a kernel for Attention of opset 23 and 24.
# Ref: microsoft/onnxruntime, pull request 27542; issue 28025 tells of 1.24.4, which computes it on the CPU.
CUDA_ATTENTION = (1, 25)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    from sdopt.engine import choose_backend, installed_backends

    found = findings()
    print(json.dumps(found, indent=1) if args.json else "\n".join(_lines(found)))
    if not installed_backends():
        choose_backend()  # raises, saying how to get one
    return 0


def findings() -> dict[str, Any]:
    """Versions, processor, backends and the choice of `auto`, as `--json` prints them.

    A backend that is not installed has `install`, one that cannot be used `broken`, one that lacks something `lacks`.
    """
    import platform

    from sdopt import __version__
    from sdopt.bundle.files import embedded
    from sdopt.engine import BACKENDS, installed_backends
    from sdopt.engine.cores import usable_cores

    installed = installed_backends()
    backends = {n: _described(n) if n in installed else {"install": BACKENDS[n].install} for n in BACKENDS}
    auto = _auto()
    return {
        "sdopt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "embedded_model": embedded().is_dir(),
        "cache": _cache(),
        "backends": backends,
        "auto": auto,
        "why": _why(auto, backends),
    }


def _described(name: str) -> dict[str, Any]:
    """What an installed backend can do here, or why it cannot be used."""
    from sdopt.engine import describe

    try:
        entry = describe(name)
    except Exception as error:  # a native library can fail to load in any way, and the doctor has to tell of it
        return {"broken": f"{type(error).__name__}: {error}"}
    if name == "ort" and "cuda" in entry["devices"]:
        return _with_cuda(entry)
    return entry


def _with_cuda(entry: dict[str, Any]) -> dict[str, Any]:
    """An ONNX Runtime that was built with CUDA: whether it can use it is seen when a graph is opened."""
    from sdopt.bundle.files import embedded

    lacks = cuda_fault(embedded() / "text_encoder.onnx")
    if lacks:
        usable = [name for name in entry["devices"] if name not in ("cuda", "tensorrt")]
        return {**entry, "devices": usable, "lacks": f"its CUDA does not load, and it computes on the CPU: {lacks}"}
    if _numbers(entry["version"]) < CUDA_ATTENTION:
        newer = ".".join(map(str, CUDA_ATTENTION))
        told = f"attention of opset 23 on CUDA: it is computed on the CPU, slowly; {newer} or newer has it"
        return {**entry, "lacks": f'{told}: pip install "onnxruntime-gpu>={newer}", or export with --opset 18'}
    return entry


def cuda_fault(graph: Path) -> str:
    """Why ONNX Runtime cannot open `graph` on CUDA, in its own words; empty if it can.

    It only logs that, and takes the CPU. A process of its own has a log of its own, and can end without harm.
    """
    command = [sys.executable, "-c", PROBE, str(graph)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0 and done.stdout.split()[-1:] == ["CUDAExecutionProvider"]:
        return ""
    missing = re.search(r"[\w.+-]+\.so[\w.]*: cannot open shared object file", done.stderr)
    if missing:
        return missing[0]
    lines = re.sub(r"\x1b\[[\d;]*m", "", done.stderr).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"it ended with code {done.returncode}")


def _numbers(version: str) -> tuple[int, ...]:
    """(1, 25) of "1.25.0" """
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])


def _cache() -> dict[str, Any]:
    """Where the cache is and how large, or why that cannot be known."""
    from sdopt.engine import cache
    from sdopt.errors import SdoptError

    try:
        return {"path": str(cache.root()), "bytes": cache.nbytes()}
    except (OSError, SdoptError) as error:  # no home folder, or files that go away meanwhile
        return {"path": None, "bytes": 0, "broken": str(error)}


def _auto() -> dict[str, str]:
    """The backend and precision that `auto` takes; nothing where no installed one computes in fp32."""
    from sdopt.engine import choose_backend
    from sdopt.errors import BackendError

    try:
        return dict(zip(("backend", "precision"), choose_backend(), strict=True))
    except BackendError:
        return {}


def _why(auto: Mapping[str, str], backends: Mapping[str, Mapping[str, Any]]) -> str:
    from sdopt.engine import BACKENDS

    installed = [name for name, entry in backends.items() if "install" not in entry]
    if not installed:
        return "no engine library is installed"
    if not auto:
        ways = " or ".join(f"--backend {name}" for name in installed)
        names = " and ".join(installed)
        return (
            f"nothing: {names} runs what `sdopt build` made, and only if asked: {ways}; or {backends['ort']['install']}"
        )
    why = "fp32 makes the picture that diffusers makes"
    if "broken" in backends[auto["backend"]]:
        others = [n for n in installed if "precisions" in backends[n] and "fp32" in backends[n]["precisions"]]
        ways = f"say --backend {others[0]}, or " if others else ""
        return f"{why}; but {auto['backend']} does not load here: {ways}install it again"
    able = [n for n, entry in backends.items() if BACKENDS[n].precisions and "bf16" in entry.get("precisions", ())]
    if able:
        return f"{why}; faster, and nearly the same: --precision bf16 (on {', '.join(able)})"
    return f"{why}; no backend here computes in bf16 itself"


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"sdopt {found['sdopt']}, Python {found['python']}, {found['platform']}, {found['cores']} cores",
        f"embedded model  {'found' if found['embedded_model'] else 'missing: install sdopt again'}",
    ]
    kept = found["cache"]
    told = f"{kept['bytes'] / 1e6:.0f} MB for quicker starts in {kept['path']}; may be deleted"
    lines.append(f"{'cache':<16}{'none: ' + kept['broken'] if 'broken' in kept else told}")
    for name, entry in found["backends"].items():
        lines.append(f"{name:<16}{_told(entry)}")
    auto = found["auto"]
    choice = f"{auto['backend']}, {auto['precision']}: " if auto else ""
    return [*lines, f"{'auto':<16}{choice}{found['why']}"]


def _told(entry: Mapping[str, Any]) -> str:
    """One backend as a line."""
    if "install" in entry:
        return f"not installed: {entry['install']}"
    if "broken" in entry:
        return f"installed, but it cannot be used: {entry['broken']}"
    known = {key: value if isinstance(value, str) else " ".join(value) for key, value in entry.items()}
    lacks = known.pop("lacks", "")
    told = ", ".join(f"{key} {value}" for key, value in known.items() if value)
    return f"{told}; lacks: {lacks}" if lacks else told
