"""Records with timings that are made up, so that what follows from them is known."""

from __future__ import annotations

import copy
from typing import Any

from sdopt.bench.cases import Case

CASE = Case("one", "emoji", 128, 128, 20, 2.0)


def side(
    name: str, seconds: dict[str, list[float]], picture_db: float | None = 100.0, **changes: Any
) -> dict[str, Any]:
    """A side; its UNet's parity is that of its picture."""
    kind = "sdopt" if name == "sdopt" else "diffusers"
    return {
        "name": name,
        "kind": kind,
        "backend": "ort",
        "precision": "fp32",
        "note": "",
        "versions": {},
        "failed": None,
        "parity": {"picture_db": picture_db, "unet_db": picture_db},
        "quotable": picture_db is not None and picture_db >= CASE.unet_floor_db,
        "seconds": seconds,
        "parts": {},
        "memory": {"peak_rss_bytes": 200_000_000, "peak_device_bytes": None, "engine_bytes": {"unet": 5}},
        **changes,
    }


def record(*sides: dict[str, Any], case: Case = CASE, **machine: Any) -> dict[str, Any]:
    """A record of one case."""
    return copy.deepcopy(
        {
            "schema": 2,
            "created": "2026-01-02T03:04:05+00:00",
            "command": "sdopt bench BUNDLE --baseline CHECKPOINT",
            "commit": None,
            "machine": {
                "cpu": "Abacus 9000",
                "cores": 2,
                "memory_bytes": 8_000_000_000,
                "system": "Linux",
                "release": "Linux-6",
                "architecture": "x86_64",
                "load_before": 0.0,
                **machine,
            },
            "gpu": None,
            "versions": {"python": "3.12.0", "sdopt": "0.1.0"},
            "results": [
                {
                    "case": case.to_json(),
                    "bundle": {"digest": "0123456789", "family": "sd"},
                    "threads": 2,
                    "device": "cpu",
                    "sides": list(sides),
                }
            ],
        }
    )


def steady(seconds: float, n: int = 8) -> list[float]:
    """`n` timings around `seconds`, 1 % up and down."""
    return [seconds * (1 + 0.01 * (-1) ** i) for i in range(n)]
