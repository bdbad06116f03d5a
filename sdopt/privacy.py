"""The libraries that sdopt imports report nothing about their use, unless the user decided otherwise.

ONNX Runtime from 1.29 on, huggingface_hub and transformers read environment variables, which are set here when `sdopt`
is imported, so before any of them. A variable that the user set stays as it is. Child processes inherit them.

openvino has no variable: `import openvino` sends an event to a web service through the package openvino_telemetry,
unless it cannot be imported. The user's decision is a file, which `opt_in_out --opt_in` writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

SILENT = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime: a device id, uploads, a thread that a forked child waits for
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, diffusers: names of libraries and models in each request
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers: asks the hub to convert the weights of a checkpoint
}
SENDER = "openvino_telemetry"
_ABSENT = object()


def silence() -> None:
    """Set the variables that the user did not set."""
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def without_openvino_telemetry() -> Generator[None]:
    """While openvino is imported in the block, it finds no openvino_telemetry and uses its own empty stand-in.

    Nothing is changed where the user opted in.
    """
    if _opted_in():
        yield
        return
    before = sys.modules.get(SENDER, _ABSENT)
    sys.modules[SENDER] = None  # pyright: ignore[reportArgumentType]  # this makes its import fail
    try:
        yield
    finally:
        if before is _ABSENT:
            sys.modules.pop(SENDER, None)
        else:
            sys.modules[SENDER] = before  # pyright: ignore[reportArgumentType]


def _opted_in() -> bool:
    """Whether the user's decision for OpenVINO is yes; without a decision it is no."""
    try:
        folder = Path(os.environ["LOCALAPPDATA"]) / "Intel Corporation" if os.name == "nt" else Path.home() / "intel"
        return (folder / SENDER).read_text(encoding="utf-8").strip() == "1"
    except (OSError, RuntimeError, KeyError, ValueError):  # no such file, no home folder
        return False
