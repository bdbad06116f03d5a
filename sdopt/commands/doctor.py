"""`sdopt doctor`: what this machine has, and which engine and precision `auto` takes on it, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any


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
    """Versions, processor, backends and the choice of `auto`, as `--json` prints them."""
    import os
    import platform

    from sdopt import __version__
    from sdopt.bundle import embedded
    from sdopt.engine import BACKENDS, cache, choose_backend, describe, installed_backends
    from sdopt.engine.cores import usable_cores

    installed = installed_backends()
    backends = {n: describe(n) if n in installed else {"install": BACKENDS[n].install} for n in BACKENDS}
    auto: dict[str, str] = dict(zip(("backend", "precision"), choose_backend(), strict=True)) if installed else {}
    return {
        "sdopt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores() or os.cpu_count(),
        "embedded_model": embedded().is_dir(),
        "cache": {"path": str(cache.root()), "bytes": cache.nbytes()},
        "backends": backends,
        "auto": auto,
        "why": _why(auto, backends),
    }


def _why(auto: Mapping[str, str], backends: Mapping[str, Mapping[str, Any]]) -> str:
    if not auto:
        return "no engine library is installed"
    why = "float32 makes the picture that diffusers makes"
    able = [name for name, entry in backends.items() if "bf16" in entry.get("precisions", ())]
    if able:
        return f"{why}; faster, and nearly the same: --precision bf16 (on {', '.join(able)})"
    return f"{why}; no backend here computes in bf16 itself"


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"sdopt {found['sdopt']}, Python {found['python']}, {found['platform']}, {found['cores']} cores",
        f"embedded model  {'found' if found['embedded_model'] else 'missing: install sdopt again'}",
    ]
    kept = found["cache"]
    lines.append(f"{'cache':<16}{kept['bytes'] / 1e6:.0f} MB for quicker starts in {kept['path']}; may be deleted")
    for name, entry in found["backends"].items():
        known = ", ".join(
            f"{key} {value if isinstance(value, str) else ' '.join(value)}" for key, value in entry.items()
        )
        lines.append(f"{name:<16}{known if 'version' in entry else 'not installed: ' + entry['install']}")
    auto = found["auto"]
    choice = f"{auto['backend']}, {auto['precision']}: " if auto else ""
    return [*lines, f"{'auto':<16}{choice}{found['why']}"]
