"""Many pictures in one process: its memory and its open files stay where they were after the first hundreds."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from pathlib import Path

import sdopt
from sdopt.errors import SdoptError
from tests.campaign.cases import DONE, GREW, OTHER, Case, Outcome
from tests.campaign.sandbox import Sandbox

PICTURES, WARM = 250, 80
ALLOWED = 48 << 20  # bytes: what allocators keep


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    pipe = sdopt.load(sandbox.bundles["emoji"], "ort:cpu", threads=1)
    first = None
    before = (0, 0)
    for i in range(PICTURES):
        request = {**sandbox.request("emoji"), "num_inference_steps": 1, "prompt": f"a cat {rng.randint(0, 9)}"}
        if i % 50 == 0:  # the same request: the same picture
            images = pipe(**{**request, "prompt": "a red apple"}, output_type="np").images
            first = images if first is None else first
            if not (images == first).all():
                return Outcome(OTHER, f"picture {i}")
        if i % 100 == 50:
            pipe.close()
            pipe = sdopt.load(sandbox.bundles["emoji"], "ort:cpu", threads=1)
        edge = rng.choice((16, 24, 32))
        pipe(**{**request, "height": edge, "width": edge})
        with suppress(SdoptError):
            pipe(**{**request, "height": 17})
        next(pipe.denoise(**request))  # left in the middle
        if i == WARM:
            gc.collect()
            before = _used()
    gc.collect()
    memory, files = _used()
    what = f"{PICTURES} pictures: {before[0] >> 20} to {memory >> 20} MB, {before[1]} to {files} open files"
    grew = memory > before[0] + ALLOWED or files > before[1] + 2
    return Outcome(GREW if grew else DONE, what)


def _used() -> tuple[int, int]:
    """Resident memory in bytes, and open files, of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
