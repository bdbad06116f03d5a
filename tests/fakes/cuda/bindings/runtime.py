"""The fake `cuda.bindings.runtime` of a process whose PYTHONPATH has `tests/fakes` in front."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[4]))

from tests.fakes.gpu import Simulator


def _words() -> dict[str, str]:
    pairs = (word.partition("=") for word in os.environ.get("SDOPT_FAKE_GPU", "10").split())
    return {key if sign else "tensorrt": value if sign else key for key, sign, value in pairs}


WORDS = _words()
simulator = Simulator(total=int(WORDS.get("bytes", 8 << 30)))


def __getattr__(name: str) -> Any:
    return getattr(simulator, name)
