"""Where the loop begins, and what it is held to: nothing but noise, a picture, or a picture with a mask.

    text to image     x = init_noise_sigma * noise
    image to image    x = start @ [latents of the picture, noise]                    Meng et al. 2021, arXiv:2108.01073
    inpainting        the same, and after each step what the mask keeps is put back   (4-channel UNet)
                      or the UNet is given the mask and the masked picture             (9-channel UNet)

The draws from each image's generator come in diffusers' order, so that a seed is the same picture.
Ref: Rombach et al. 2022, arXiv:2112.10752, section 4.5, for the 9-channel UNet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Float32, Scalar
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.request.plan import Plan
from sdopt.samplers import SamplerTable

Draw = Callable[[], Float32]  # standard normal noise in the shape of the latents, each image's from its own generator
Posterior = tuple[Float32, Float32 | None]  # mean and standard deviation of latents; without the latter there is one
Encode = Callable[[Float32], Posterior]  # of pictures in -1..1


@dataclass(frozen=True)
class Canvas:
    """What the loop starts from.

    Shapes: sample [images, channels, h, w]; extra [images, 5, h, w], joined to the UNet's input; clean and noise like
    the sample, mask [images, 1, h, w]: with a mask, `restore_unmasked` puts back what it keeps.
    """

    sample: Float32
    extra: Float32 | None = None
    mask: Float32 | None = None
    clean: Float32 | None = None
    noise: Float32 | None = None

    def restore_unmasked(self, table: SamplerTable, k: int, sample: Float32) -> Float32:
        """The sample after call `k`, with the kept part of the picture at the noise level of the next call.

        After the last call it is the picture itself, as in diffusers.
        """
        if self.mask is None or self.clean is None or self.noise is None:
            return sample
        level: list[Scalar] = table.level[k + 1].tolist() if k + 1 < len(table) else [1.0, 0.0]
        alpha, sigma = level
        kept = alpha * self.clean + sigma * self.noise
        repainted: Float32 = self.mask * sample
        return repainted + (1 - self.mask) * kept


def has_mask_channels(bundle: Bundle) -> bool:
    """Whether the UNet takes more channels than the latents have: a mask and a masked picture beside them."""
    return bundle.denoiser.inputs[0].shape[1] != bundle.manifest.latents.channels


def prepare_canvas(plan: Plan, mask_channels: bool, draw: Draw, encode: Encode) -> Canvas:
    """The canvas of a plan; `mask_channels`: the UNet takes the mask and the masked picture beside the sample."""
    table = plan.table
    if mask_channels and plan.mask is None:
        raise UsageError("this bundle is an inpainting model: give image and mask_image")
    if plan.image is None and plan.image_latents is None:
        noise = draw() if plan.latents is None else plan.latents
        return Canvas(_pure(table, noise))
    if plan.mask is not None:
        return _inpaint(plan, plan.mask, mask_channels, draw, encode)
    clean = _clean(plan, draw, encode)
    return Canvas(clean if plan.continues else _start(table, clean, draw()))


def _inpaint(plan: Plan, mask: Float32, mask_channels: bool, draw: Draw, encode: Encode) -> Canvas:
    table = plan.table
    clean = _clean(plan, draw, encode) if not mask_channels or plan.strength < 1 or plan.continues else None
    noise = draw()
    sample = _pure(table, noise)
    if clean is not None and (plan.continues or plan.strength < 1):
        sample = clean if plan.continues else _start(table, clean, noise)
    small = _nearest(mask, *sample.shape[2:])
    if plan.image is None:
        if mask_channels:
            raise UsageError("image: latents cannot be masked for this inpainting model; give the picture itself")
        return Canvas(sample, mask=small, clean=clean, noise=noise)
    visible = _sampled(encode(plan.image * (mask < 0.5)), draw)  # drawn also where it is not used, as diffusers does
    if mask_channels:
        return Canvas(sample, extra=np.concatenate([small, visible], 1))
    return Canvas(sample, mask=small, clean=clean, noise=noise)


def _clean(plan: Plan, draw: Draw, encode: Encode) -> Float32:
    """The latents that the loop begins from: as they were given, or the picture's."""
    if plan.image_latents is not None:
        return plan.image_latents
    return _sampled(encode(cast(Float32, plan.image)), draw)


def _pure(table: SamplerTable, noise: Float32) -> Float32:
    scale: Scalar = table.init_noise_sigma
    return scale * noise


def _start(table: SamplerTable, clean: Float32, noise: Float32) -> Float32:
    signal, spread = cast(tuple[Scalar, Scalar], table.start)
    return signal * clean + spread * noise


def _sampled(posterior: Posterior, draw: Draw) -> Float32:
    mean, deviation = posterior
    return mean if deviation is None else mean + deviation * draw()


def _nearest(mask: Float32, height: int, width: int) -> Float32:
    """The mask at the size of the latents: the first pixel of each cell, as torch's nearest interpolation takes it."""
    rows = np.arange(height) * mask.shape[2] // height
    columns = np.arange(width) * mask.shape[3] // width
    return mask[:, :, rows][:, :, :, columns]
