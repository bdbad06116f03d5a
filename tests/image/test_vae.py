"""The autoencoder: the manifest's factor is that of its graphs, or there is no picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sdopt
from sdopt.errors import BundleError


@pytest.mark.parametrize("factor", [2, 4, 16, 32])
@pytest.mark.parametrize("tile", [None, 4])
def test_a_factor_that_is_not_the_autoencoders_makes_no_picture(
    factor: int, tile: int | None, bundle_copy: Path
) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["latents"]["factor"] = factor
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with sdopt.load(bundle_copy, threads=1) as pipe:
        options = {"num_inference_steps": 2, "height": 64 * factor // 8, "width": 64 * factor // 8, "seed": 1}
        with pytest.raises(BundleError, match=f"latents.factor = {factor}"):
            pipe("a cat", vae_tile=tile, **options)
        picture = np.zeros((64, 64, 3), np.float32)
        with pytest.raises(BundleError, match=f"latents.factor = {factor}"):
            pipe("a cat", image=picture, num_inference_steps=4, vae_tile=tile)
