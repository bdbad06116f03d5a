"""Classifier-free guidance: the UNet with and without the prompt, and what is made of the two.

Ref: Ho & Salimans 2022, arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sdopt.bundle.specs import Float32, Scalar
from sdopt.engine import Engine


class Denoiser:
    """The UNet with classifier-free guidance: output = uncond + scale * (cond - uncond); at 1 or less, cond alone.

    With `embedding` the UNet was distilled with guidance, and is told the scale by a vector of that width instead.
    `cond` and `negative` are the further inputs of `unet` by name; `extra` is joined to the sample as further channels.
    `batch` 2 runs both halves of guidance in one call, 1 in two.
    Ref: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, in the form of Saharia et al. 2022, arXiv:2205.11487, section 2.2.
    """

    def __init__(
        self,
        unet: Engine,
        cond: Mapping[str, Float32],
        negative: Mapping[str, Float32] | None,
        extra: Float32 | None = None,
        batch: int = 2,
        rescale: float = 0.0,
        embedding: int = 0,
    ) -> None:
        self._unet, self._extra, self._rescale, self._embedding = unet, extra, rescale, embedding
        inputs = unet.inputs
        self._shares = bool(inputs) and inputs[0].shape[0] == "images"  # the graph itself repeats the sample
        self._cond, self._negative, self._both = cond, negative, None
        if negative is not None and batch == 2:
            self._both = {name: np.concatenate([negative[name], cond[name]]) for name in cond}

    def __call__(self, sample: Float32, timestep: float, scale: Scalar) -> Float32:
        sample = sample if self._extra is None else np.concatenate([sample, self._extra], 1)
        if self._embedding:
            told = np.tile(scale_embedding(scale - 1, self._embedding), (len(sample), 1))
            return self._run(sample, timestep, {**self._cond, "timestep_cond": told})
        if self._negative is None or scale <= 1:
            return self._run(sample, timestep, self._cond)
        if self._both is None:
            uncond, cond = self._run(sample, timestep, self._negative), self._run(sample, timestep, self._cond)
        else:
            both = sample if self._shares else np.concatenate([sample, sample])
            uncond, cond = np.split(self._run(both, timestep, self._both), 2)
        with np.errstate(invalid="ignore", over="ignore"):  # the loop names component and step of what is not finite
            guided = uncond + scale * (cond - uncond)
            return rescaled(guided, cond, self._rescale) if self._rescale else guided

    def _run(self, sample: Float32, timestep: float, condition: Mapping[str, Float32]) -> Float32:
        times = np.full(len(sample), timestep, np.float32)
        return self._unet(sample=sample, timestep=times, **condition)["noise_pred"]


def scale_embedding(w: float, width: int) -> Float32:
    """The guidance scale w as [width]: sines and cosines of 1000 w at falling frequencies, as timesteps are embedded.

    In float32 throughout, where diffusers is: the angles reach thousands.
    Ref: Meng et al. 2023, arXiv:2210.03142; Luo et al. 2023, arXiv:2310.04378, section 4.2.
    """
    half = width // 2
    step = np.log(np.float32(10000)) / np.float32(half - 1)
    frequencies: Float32 = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.full(half, w, np.float32)
    angles *= 1000
    angles *= frequencies
    row = np.zeros(width, np.float32)
    row[:half], row[half : 2 * half] = np.sin(angles), np.cos(angles)
    return row


def rescaled(guided: Float32, cond: Float32, share: Scalar) -> Float32:
    """`guided`, of which `share` is scaled to the standard deviation that the conditional output has.

    Ref: Lin et al. 2024, arXiv:2305.08891, section 3.4.
    """
    axes = tuple(range(1, cond.ndim))
    scale = cond.std(axes, keepdims=True, ddof=1) / guided.std(axes, keepdims=True, ddof=1)
    return guided * (share * scale + (1 - share))
