"""Latents at a larger size, as AUTOMATIC1111's upscaler "Latent" makes them: bilinear, without smoothing before it.

    value at y   (1 - f) * row[i] + f * row[i + 1]     with i + f = (y + 1/2) * small / large - 1/2, held inside

and the same for the columns.
Ref: AUTOMATIC1111/stable-diffusion-webui, modules/shared_items.py, latent_upscale_modes ("Latent": mode "bilinear",
antialias False), which are arguments of torch.nn.functional.interpolate with align_corners=False.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from sdopt.bundle.specs import Array, Float32
from sdopt.request.plan import Plan


def upscaled(latents: Float32, height: int, width: int) -> Float32:
    """Latents [images, channels, h, w] as [images, channels, height, width]."""
    return _along(_along(latents, height, 2), width, 3)


def second_pass(plan: Plan, sample: Float32) -> Plan:
    """The second pass of hires fix, which begins from the last sample of the first one."""
    height, width = cast(Array, plan.image_latents).shape[2:]
    return replace(plan, image_latents=upscaled(sample, height, width))


def _along(latents: Float32, size: int, axis: int) -> Float32:
    small = latents.shape[axis]
    place = np.clip((np.arange(size) + 0.5) * small / size - 0.5, 0, small - 1)
    low = place.astype(np.intp)
    high = np.minimum(low + 1, small - 1)
    shape = [1] * latents.ndim
    shape[axis] = size
    part: Float32 = np.asarray(place - low, np.float32).reshape(shape)
    rest: Float32 = 1 - part
    before: Float32 = np.take(latents, low, axis)
    behind: Float32 = np.take(latents, high, axis)
    mixed: Float32 = np.add(before * rest, behind * part)
    return mixed
