"""The embedded model's training runs from nothing to a checkpoint that loads."""

from __future__ import annotations

import importlib.util
import os
import shutil
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


@pytest.mark.skipif(
    bool({*MISSING} - {"matplotlib"}) or not FONT.exists(), reason="needs .[train] and fonts-noto-color-emoji"
)
def test_a_few_steps_make_a_tiny_autoencoder_that_fits_the_bundle_and_a_killed_run_continues(tmp_path: Path) -> None:
    import numpy as np

    import sdopt
    from sdopt.export.onto import add_adapter
    from tests.conftest import EMOJI_BUNDLE

    out = tmp_path / "tiny"
    for more in ((), ("--resume",)):
        done = subprocess.run(
            [sys.executable, str(ROOT / "engines/emoji/train_tiny.py"), "--smoke", "--out", str(out), *more],
            check=True, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        assert ("decoder step 3/3" in done.stdout) == (not more)  # with all steps done, nothing is left to do
    bundle = Path(shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle"))
    add_adapter(out, bundle, "tiny", report=lambda line: None, offline=True)
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)
    with sdopt.load(bundle, threads=1) as pipe:
        assert pipe.decode(latents, "np", vae="tiny").shape == pipe.decode(latents, "np").shape == (1, 128, 128, 3)
