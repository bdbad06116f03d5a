"""The embedded model's own ControlNet: what it draws has the shape that it sees, and is what diffusers draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdopt
from sdopt.metrics import psnr
from tests.conftest import EMOJI_CHECKPOINT, ROOT

BLUE = np.array([40, 85, 225]) / 255
PROMPT = "a red apple on a blue background"
BOXES = {"low at the left": (10, 60, 60, 115), "high at the right": (70, 8, 118, 60), "wide": (8, 40, 120, 90)}


@pytest.fixture(scope="module")
def emoji() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as pipe:
        yield pipe


def silhouette(box: tuple[int, int, int, int]) -> Image.Image:
    picture = Image.new("RGB", (128, 128))
    ImageDraw.Draw(picture).ellipse(box, fill="white")
    return picture


def overlap(picture: Any, seen: Image.Image) -> float:
    """Intersection over union of what is drawn, whatever is not blue, and what was seen."""
    drawn = np.abs(picture - BLUE).max(-1) > 0.3
    wanted = np.asarray(seen)[..., 0] > 127
    return float((drawn & wanted).sum() / (drawn | wanted).sum())


@pytest.mark.parametrize("place", BOXES)
def test_it_draws_where_and_in_the_shape_that_it_is_shown(emoji: sdopt.Pipeline, place: str) -> None:
    seen = silhouette(BOXES[place])
    options: dict[str, Any] = {"seed": 3, "output_type": "np"}
    free = emoji(PROMPT, **options).images[0]
    steered = emoji(PROMPT, control_image=seen, **options).images[0]
    assert overlap(steered, seen) > 0.8 > 0.6 > overlap(free, seen)


def test_it_is_the_picture_that_diffusers_makes(emoji: sdopt.Pipeline) -> None:
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_pretrained(ROOT / "engines/emoji/silhouette", torch_dtype=torch.float32)
    theirs = StableDiffusionControlNetPipeline.from_pretrained(
        EMOJI_CHECKPOINT, controlnet=net, torch_dtype=torch.float32, safety_checker=None
    )
    theirs.set_progress_bar_config(disable=True)
    seen = silhouette(BOXES["wide"])
    options: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "np"}
    size = {"height": 128, "width": 128}
    expected = theirs(PROMPT, image=seen, generator=torch.Generator().manual_seed(3), **size, **options).images
    assert psnr(expected, emoji(PROMPT, control_image=seen, seed=3, **options).images) >= 60
