"""The embedded model's training runs from nothing to a checkpoint that loads."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
MISSING = [name for name in ("emoji", "fontTools", "matplotlib") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING) or not FONT.exists(), reason="needs .[train] and fonts-noto-color-emoji")
def test_a_few_steps_of_every_phase_make_a_checkpoint_that_loads(tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "emoji"
    subprocess.run(
        [sys.executable, str(ROOT / "engines/emoji/train.py"), "--smoke", "--out", str(out)],
        check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    pipe = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32, safety_checker=None)
    image = pipe("a cat", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
