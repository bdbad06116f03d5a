"""Hires fix: a picture is made small, its latents are enlarged, and a second pass makes the details at the larger size.

    hires           how many times larger each side becomes
    hires_strength  how much of the enlarged latents is replaced: `strength` of the second pass
    hires_steps     `num_inference_steps` of the second pass; without it that of the first one

The second pass is the call with `image=` the enlarged latents and the same prompt, seed, sampler and guidance.
Ref: AUTOMATIC1111/stable-diffusion-webui, modules/processing.py, StableDiffusionProcessingTxt2Img.sample_hr_pass. Its
default of denoising strength is 0.7, which latents need: less leaves the blur of the enlargement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdopt.errors import UsageError
from sdopt.request.kinds import MAX_PIXELS, MAX_SIZE

STRENGTH = 0.7
REFUSED = {
    "image": "it enlarges what is made from text; to enlarge a picture give image= with a larger height= and width=",
    "mask_image": "it enlarges what is made from text; paint the picture at its full size",
    "denoising_start": "both passes go all the way",
    "denoising_end": "both passes go all the way",
}


def check(given: Mapping[str, Any]) -> None:
    """Raises: UsageError for keywords that do not fit beside `hires`, or need it."""
    if given["hires"] is None:
        for name in ("hires_strength", "hires_steps"):
            if given[name] is not None:
                raise UsageError(f"{name} needs hires: give hires=2.0", name)
        return
    for name, reason in REFUSED.items():
        if given[name] is not None:
            raise UsageError(f"{name} and hires: {reason}; leave out one of the two", name)
    if isinstance(given["guidance_scale"], list):
        text = "guidance_scale and hires: its two passes have their own numbers of calls; give one scale"
        raise UsageError(text, "guidance_scale")
    if given["cache_schedule"] is not None:
        text = "cache_schedule and hires: its two passes have their own numbers of calls; give cache_interval"
        raise UsageError(text, "cache_schedule")
    for name in ("timesteps", "sigmas"):
        if given[name] is not None and given["hires_steps"] is not None:
            raise UsageError(
                f"hires_steps and {name}: both passes take the {name}; leave out hires_steps", "hires_steps"
            )


def size(scale: float, height: int, width: int, factor: int) -> tuple[int, int]:
    """Height and width in pixels of the second pass, each rounded down to a multiple of `factor`.

    Raises: UsageError for more than a picture may have.
    """
    large_height, large_width = (int(side * scale) // factor * factor for side in (height, width))
    if max(large_height, large_width) > MAX_SIZE or large_height * large_width > MAX_PIXELS:
        raise UsageError(
            f"hires = {scale:g} makes {large_width}x{large_height} pixels of {width}x{height}; allowed are {MAX_SIZE} "
            f"a side and {MAX_PIXELS:,} in all",
            "hires",
        )
    return large_height, large_width


def second_pass(
    given: Mapping[str, Any], seeds: Sequence[int], height: int, width: int, shape: tuple[int, ...]
) -> dict[str, Any]:
    """The keywords of the second pass, at its height and width; `shape` is that of its latents.

    Its `image` are latents of zeros, whose place those of the first pass take.
    """
    steps = given["num_inference_steps"] if given["hires_steps"] is None else given["hires_steps"]
    return {
        **given,
        "hires": None,
        "hires_strength": None,
        "hires_steps": None,
        "image": np.broadcast_to(np.float32(0), shape),
        "latents": None,
        "strength": STRENGTH if given["hires_strength"] is None else given["hires_strength"],
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "seed": list(seeds),
    }


NAMES = {"strength": "hires_strength", "num_inference_steps": "hires_steps", "height": "hires", "width": "hires"}


def renamed(error: UsageError) -> UsageError:
    """An error of the second pass, which names the keyword that the caller gave."""
    return UsageError(f"hires, the second pass: {error}", NAMES.get(error.param or "", error.param))
