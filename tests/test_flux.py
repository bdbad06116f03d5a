"""Flux's pictures are those that diffusers makes: dev, which takes the guidance scale, and schnell, which does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.errors import UsageError
from tests import tiny
from tests.test_families import theirs
from tests.test_pipeline import FLOOR_DB, ON_CPUS, picture_psnr
from tests.test_sdxl import generators

T2I, I2I, INPAINT = (f"Flux{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
WIDE = {"height": 24, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 11}
SHADES = np.random.default_rng(0).random((24, 32, 3), np.float32)
PICTURE = Image.fromarray((SHADES * 255).astype(np.uint8))
MASK = Image.new("L", (32, 24))
MASK.paste(255, (8, 6, 20, 18))


@pytest.fixture(scope="module", params=ON_CPUS)
def pipe(request: pytest.FixtureRequest, flux_bundle: Path) -> sdopt.Pipeline:
    return sdopt.load(flux_bundle, request.param)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory, flux_bundle: Path) -> tuple[Path, sdopt.Pipeline]:
    folder = tmp_path_factory.mktemp("schnell")
    checkpoint = tiny.schnell(folder / "checkpoint")
    return checkpoint, sdopt.load(tiny.export_like(checkpoint, folder / "bundle", flux_bundle))


CASES: list[dict[str, Any]] = [
    {},
    {"height": 28, "width": 20},
    {"guidance_scale": 1.0},
    {"prompt_2": "a dog", "max_sequence_length": 9},
    {"negative_prompt": "b", "true_cfg_scale": 2.5},
    {"negative_prompt": "", "negative_prompt_2": "cat", "true_cfg_scale": 2.5},
]


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("options", CASES, ids=lambda options: ",".join(options) or "plain")
def test_the_picture_is_the_one_that_diffusers_makes(options: Any, flux_checkpoint: Path, pipe: sdopt.Pipeline) -> None:
    expected, found = pictures(theirs(flux_checkpoint, T2I), pipe, options)
    assert found.shape == expected.shape
    assert picture_psnr(expected, found) >= FLOOR_DB


def pictures(pipeline: Any, pipe: sdopt.Pipeline, options: dict[str, Any]) -> tuple[Any, Any]:
    """Two pictures of diffusers and of sdopt."""
    options = {**WIDE, **options, "output_type": "np"}
    several = {name: [value] * 2 if "prompt" in name else value for name, value in options.items()}
    texts = ["a cat", "an apple or a long text"]
    expected = pipeline(texts, generator=generators(5, 6), **several).images
    return expected, pipe(texts, seed=[5, 6], **options).images


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_becomes_the_one_that_diffusers_makes(
    masked: bool, strength: float, flux_checkpoint: Path, pipe: sdopt.Pipeline
) -> None:
    options = {**WIDE, "strength": strength, "image": PICTURE, "output_type": "np"}
    options |= {"mask_image": MASK} if masked else {}
    several = {name: [value] * 2 if "image" in name else value for name, value in options.items()}
    pipeline = theirs(flux_checkpoint, INPAINT if masked else I2I)
    expected = pipeline(["a cat", "b"], generator=generators(5, 6), **several).images
    assert picture_psnr(expected, pipe(["a cat", "b"], seed=[5, 6], **options).images) >= FLOOR_DB


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("options", [{}, {"height": 20, "width": 28}, {"negative_prompt": "b", "true_cfg_scale": 2.5}])
def test_schnell_takes_no_guidance_scale(options: Any, schnell: tuple[Path, sdopt.Pipeline]) -> None:
    checkpoint, pipe = schnell
    given = {name: value for name, value in WIDE.items() if name != "guidance_scale"}
    with_scale, without = (
        pipe("a cat", seed=5, output_type="latent", **{**own, **options}).images for own in (WIDE, given)
    )
    np.testing.assert_array_equal(with_scale, without)
    expected, found = pictures(theirs(checkpoint, T2I), pipe, options)
    assert picture_psnr(expected, found) >= FLOOR_DB


def test_what_has_no_effect_is_told(schnell: tuple[Path, sdopt.Pipeline], pipe: sdopt.Pipeline) -> None:
    plan = schnell[1].plan("a cat", guidance_scale=3.0)
    assert any("guidance_scale has no effect: this model was distilled without" in line for line in plan.remarks)
    plan = pipe.plan("a cat", true_cfg_scale=3.0)
    assert any("true_cfg_scale has no effect: there is no negative half" in line for line in plan.remarks)
    plan = pipe.plan("a cat", negative_prompt="b")
    assert any("give negative_prompt and true_cfg_scale=4.0" in line for line in plan.remarks)
    with pytest.raises(UsageError, match="clip_skip has no effect: this model reads no layer of CLIP"):
        pipe.plan("a cat", clip_skip=1)


def test_an_image_of_a_batch_is_the_image_made_alone(pipe: sdopt.Pipeline) -> None:
    options: Any = {**WIDE, "true_cfg_scale": 2.0}
    together = pipe(["a cat", "b"], seed=[5, 6], negative_prompt=["", "c"], output_type="np", **options)
    for i, prompt in enumerate(["a cat", "b"]):
        again = {key: together.parameters[i][key] for key in ("negative_prompt", "seed", *options)}
        assert picture_psnr(pipe(prompt, output_type="np", **again).images[0], together.images[i]) >= 100


def test_the_scale_is_one_for_each_call_if_it_is_given_so(pipe: sdopt.Pipeline) -> None:
    scales = pipe("a cat", seed=5, output_type="latent", **{**WIDE, "guidance_scale": [3.0, 3.0, 1.0, 1.0]}).images
    one = pipe("a cat", seed=5, output_type="latent", **WIDE).images
    assert np.abs(scales - one).max() > 1e-4
