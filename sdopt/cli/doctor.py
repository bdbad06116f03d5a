"""`sdopt doctor`: what this machine has and lacks, which engine and precision `auto` takes on it, and why."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.cli.parser import Parser

# The program of `cuda_fault`: it prints the provider that ONNX Runtime opens a graph with when it is asked for CUDA.
IMPORT = """
from sdopt import privacy
with privacy.without_openvino_telemetry():
    import {library}
"""
PROBE = """
import sys, onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
print(onnxruntime.InferenceSession(sys.argv[1], options, providers=["CUDAExecutionProvider"]).get_providers()[0])
"""
# The first release whose CUDA provider has a kernel for Attention of opset 23 and 24.
# Ref: microsoft/onnxruntime, pull request 27542; in issue 28025, release 1.24.4 computes it on the CPU.
CUDA_ATTENTION = (1, 25)


def add_arguments(parser: Parser) -> None:
    parser.group("output")("--json", action="store_true", help="print the findings as JSON")
    parser.examples(
        "sdopt doctor",
        "sdopt doctor --json",
    )


def run(args: argparse.Namespace) -> int:
    from sdopt.cli.terminal import one_line
    from sdopt.engine import choose_backend, installed_backends

    report = findings()
    print(json.dumps(report, indent=1) if args.json else "\n".join(map(one_line, _lines(report))))
    if not installed_backends():
        choose_backend()  # raises an error that says how to install one
    return 0


def findings() -> dict[str, Any]:
    """Versions, processor, backends and the choice of `auto`, as `--json` prints them.

    The entry of a backend has the key `install` if it is not installed, `broken` if it cannot be used, and `lacks` if
    something is missing.
    """
    import platform

    from sdopt import __version__
    from sdopt.bundle.files import embedded
    from sdopt.engine import BACKENDS, installed_backends
    from sdopt.engine.cores import usable_cores

    installed = installed_backends()
    backends: dict[str, dict[str, Any]] = {}
    for name, backend in BACKENDS.items():
        backends[name] = _backend_entry(name) if name in installed else {"install": backend.install}
    auto = _auto_choice()
    return {
        "sdopt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "embedded_model": embedded().is_dir(),
        "cache": _cache_entry(),
        "backends": backends,
        "auto": auto,
        "why": _why(auto, backends),
    }


def _backend_entry(name: str) -> dict[str, Any]:
    """What an installed backend can do here, or why it cannot be used."""
    from sdopt.engine import BACKENDS, describe

    crash = import_crash(BACKENDS[name].library)
    if crash:
        return {"broken": crash}
    try:
        entry = describe(name)
        return _checked_cuda(entry) if name == "ort" and "cuda" in entry["devices"] else entry
    except (Exception, SystemExit) as error:  # a native library can fail in any way, and the doctor reports how
        return {"broken": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _checked_cuda(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of an ONNX Runtime that was built with CUDA. A graph is opened to see whether it can use CUDA."""
    from sdopt.bundle.files import embedded

    fault = cuda_fault(embedded() / "text_encoder.onnx")
    if fault:
        usable = [device for device in entry["devices"] if device not in ("cuda", "tensorrt")]
        return {**entry, "devices": usable, "lacks": f"its CUDA does not load, and it computes on the CPU: {fault}"}
    if _major_minor(entry["version"]) < CUDA_ATTENTION:
        newer = ".".join(map(str, CUDA_ATTENTION))
        lacks = (
            f"attention of opset 23 on CUDA: it is computed on the CPU, slowly; {newer} or newer has it: "
            f'pip install "onnxruntime-gpu>={newer}", or export with --opset 18'
        )
        return {**entry, "lacks": lacks}
    return entry


def cuda_fault(graph: Path) -> str:
    """Why ONNX Runtime cannot open `graph` on CUDA, in its own words; empty if it can.

    When CUDA fails, ONNX Runtime logs the reason and takes the CPU. So it runs in a process of its own, whose log can
    be read and which may crash without harm.
    """
    command = [sys.executable, "-c", PROBE, str(graph)]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if probe.returncode == 0 and probe.stdout.split()[-1:] == ["CUDAExecutionProvider"]:
        return ""
    missing_library = re.search(r"[\w.+-]+\.so[\w.]*: cannot open shared object file", probe.stderr)
    if missing_library:
        return missing_library[0]
    without_colours = re.sub(r"\x1b\[[\d;]*m", "", probe.stderr)
    lines = [line.strip() for line in without_colours.split("\n") if line.strip()]
    return lines[-1] if lines else f"it ended with code {probe.returncode}"


def import_crash(library: str) -> str:
    """How importing a library ends its process; empty if it does not. It runs in a process of its own."""
    try:
        command = [sys.executable, "-c", IMPORT.format(library=library)]
        probe = subprocess.run(command, capture_output=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if probe.returncode >= 0:  # also an exception, which is reported where it is imported
        return ""
    return f"its import ends the process by signal {-probe.returncode}; install it again"


def _major_minor(version: str) -> tuple[int, ...]:
    """(1, 25) of "1.25.0" """
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])


def _cache_entry() -> dict[str, Any]:
    """Where the cache is and how large it is, or why it cannot be read."""
    from sdopt.engine import cache
    from sdopt.errors import SdoptError

    try:
        return {"path": str(cache.root()), "bytes": cache.nbytes()}
    except (OSError, SdoptError) as error:  # no home folder, or files that are deleted meanwhile
        return {"path": None, "bytes": 0, "broken": str(error)}


def _auto_choice() -> dict[str, str]:
    """The backend and precision that `auto` takes; empty if no installed backend computes in fp32."""
    from sdopt.engine import choose_backend

    try:
        backend, precision = choose_backend()
    except Exception:  # also what a broken library raises; the line of its backend says it
        return {}
    return {"backend": backend, "precision": precision}


def _why(auto: Mapping[str, str], backends: Mapping[str, Mapping[str, Any]]) -> str:
    """Why `auto` takes what it takes, and what else could be asked for."""
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
        others = [name for name in installed if "fp32" in backends[name].get("precisions", ())]
        advice = f"say --backend {others[0]}, or " if others else ""
        return f"{why}; but {auto['backend']} does not load here: {advice}install it again"
    computes_itself = [name for name in backends if BACKENDS[name].precisions]  # the others run only what was built
    with_bf16 = [name for name in computes_itself if "bf16" in backends[name].get("precisions", ())]
    if with_bf16:
        return f"{why}; faster, and nearly the same: --precision bf16 (on {', '.join(with_bf16)})"
    return f"{why}; no backend here computes in bf16 itself"


def _lines(report: Mapping[str, Any]) -> list[str]:
    auto = report["auto"]
    choice = f"{auto['backend']}, {auto['precision']}: " if auto else ""
    return [
        f"sdopt {report['sdopt']}, Python {report['python']}, {report['platform']}, {report['cores']} cores",
        f"embedded model  {'found' if report['embedded_model'] else 'missing: install sdopt again'}",
        f"{'cache':<16}{_cache_text(report['cache'])}",
        *(f"{name:<16}{_backend_text(entry)}" for name, entry in report["backends"].items()),
        f"{'auto':<16}{choice}{report['why']}",
    ]


def _cache_text(entry: Mapping[str, Any]) -> str:
    if "broken" in entry:
        return f"none: {entry['broken']}"
    return f"{entry['bytes'] / 1e6:.0f} MB for quicker starts in {entry['path']}; may be deleted"


def _backend_text(entry: Mapping[str, Any]) -> str:
    """One backend in a line."""
    if "install" in entry:
        return f"not installed: {entry['install']}"
    if "broken" in entry:
        return f"installed, but it cannot be used: {entry['broken']}"
    properties = {key: value if isinstance(value, str) else " ".join(value) for key, value in entry.items()}
    lacks = properties.pop("lacks", "")
    text = ", ".join(f"{key} {value}" for key, value in properties.items() if value)
    return f"{text}; lacks: {lacks}" if lacks else text
