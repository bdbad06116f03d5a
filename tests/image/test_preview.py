"""Previews look like the pictures that the decoder makes, at no cost; and what a bundle can do is told by inspect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.files import read_manifest
from sdopt.bundle.format import Preview
from sdopt.errors import BundleError, UsageError
from sdopt.export import preview
from tests.conftest import EMOJI_BUNDLE, edit_manifest
from tests.conftest import sdopt as command
from tests.test_pipeline import picture_psnr


@pytest.fixture(scope="module")
def fitted() -> Preview:
    """The map of the embedded model's VAE."""
    entry = preview.fit(EMOJI_BUNDLE, read_manifest(EMOJI_BUNDLE))
    assert entry is not None
    return entry


def test_the_map_explains_most_of_what_the_decoder_does(fitted: Preview) -> None:
    assert np.shape(fitted.matrix) == (5, 3)
    assert fitted.r2 > 0.6
    assert fitted.psnr_db > 14


def test_a_preview_resembles_the_decoded_picture(bundle_copy: Path, fitted: Preview, tmp_path: Path) -> None:
    edit_manifest(bundle_copy, preview=fitted)
    with sdopt.load(bundle_copy) as pipe:
        steps = list(pipe.denoise(["a red apple", "a cat"], seed=[1, 2], num_inference_steps=6))
        latents, factor = steps[-1].sample, 8
        decoded = pipe.decode(latents, "np")
        cells = decoded.reshape(2, 16, factor, 16, factor, 3).mean((2, 4))
        seen = pipe.preview(latents, output_type="np")
        assert (seen.dtype, seen.shape) == (np.uint8, (2, 16, 16, 3))
        assert picture_psnr(cells, seen / np.float32(255)) > 12
        assert picture_psnr(cells, seen[::-1] / np.float32(255)) < picture_psnr(cells, seen / np.float32(255))
        assert [p.size for p in pipe.preview(steps[0].denoised, scale=8)] == [(128, 128)] * 2
        assert pipe.preview(latents, scale=4, output_type="np").shape == (2, 64, 64, 3)
        with pytest.raises(UsageError, match="output_type = 'latent'"):
            pipe.preview(latents, output_type="latent")
    done = command(
        "generate", "a cat", "-m", bundle_copy, "-n", 2, "--steps", 5, "--preview-every", 2, "-o", tmp_path / "a.png"
    )
    assert done.returncode == 0, done.stderr
    names = [f"a-{i}{part}.png" for i in (0, 1) for part in ("", "-step-002", "-step-004")]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(names)
    assert Image.open(tmp_path / "a-1-step-004.png").size == (128, 128)


def test_the_exported_bundle_carries_its_map(tiny_bundle: Path) -> None:
    with sdopt.load(tiny_bundle) as pipe:
        entry = pipe.bundle.manifest.preview
        assert entry is not None
        assert np.shape(entry.matrix) == (5, 3)
        assert pipe.preview(np.zeros((1, 4, 3, 5), np.float32), output_type="np").shape == (1, 3, 5, 3)


def test_the_pictures_of_the_fit_are_always_the_same() -> None:
    first, again = preview.pictures(32), preview.pictures(32)
    assert len(first) == preview.PICTURES
    assert all(np.array_equal(a, b) and a.min() >= 0 and a.max() <= 1 for a, b in zip(first, again, strict=True))


def test_a_bundle_without_a_map_says_what_to_do(bundle_copy: Path, tmp_path: Path) -> None:
    latents = np.zeros((1, 4, 2, 2), np.float32)
    edit_manifest(bundle_copy, preview=None)
    with sdopt.load(bundle_copy) as pipe, pytest.raises(BundleError, match="has no previews; export it again"):
        pipe.preview(latents)
    done = command("generate", "a", "-m", bundle_copy, "--preview-every", 1, "-o", tmp_path / "a.png")
    assert (done.returncode, list(tmp_path.glob("*.png"))) == (3, [])
    done = command("generate", "a", "--preview-every", 0, "-o", tmp_path / "a.png")
    assert (done.returncode, "--preview-every 0; allowed is 1 or more" in done.stderr) == (2, True)


def test_inspect_tells_what_a_bundle_can_do(tiny_bundle: Path) -> None:
    able = json.loads(command("inspect", tiny_bundle, "--json").stdout)["capabilities"]
    assert able["tasks"] == ["txt2img", "img2img", "inpaint"]
    assert able["inpaint"].startswith("4 channels")
    assert able["family"] == "sd"
    assert (able["size_multiple"], able["max_images"], able["tokens_per_chunk"], able["max_clip_skip"]) == (2, 64, 5, 2)
    assert able["embeddings"] == {"text_encoder": 20}
    assert set(able["preview"]) == {"r2", "psnr_db"}
    assert able["float16_unsafe"] == []
    assert able["samplers"].startswith("PNDMScheduler, or any")
    text = command("inspect", tiny_bundle).stdout
    for line in (
        "tasks      txt2img, img2img, inpaint (4 channels",
        "embeddings text_encoder [n, 20]",
        "previews   R2 ",
    ):
        assert line in text
