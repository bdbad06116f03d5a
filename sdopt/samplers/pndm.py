"""PNDM: a linear multistep method on the model outputs, in the variance-preserving frame.

Ref: Liu et al. 2022, arXiv:2202.09778, equation 9 (the transfer) and equations 12-13 (the mixtures).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdopt import schedules
from sdopt.errors import UsageError
from sdopt.samplers.ddim import at, at_or_final, ratio, split, start_of
from sdopt.samplers.grids import integer_grid
from sdopt.samplers.prediction import clean_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable

Float64 = NDArray[np.float64]

# Adams-Bashforth mixtures of the newest outputs.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(r: Request) -> SamplerTable:
    """PNDM's table: PLMS alone (skip_prk_steps, what Stable Diffusion uses), or after a Runge-Kutta warm-up.

    Raises: UsageError for a prediction other than epsilon and v_prediction: the outputs are mixed before conversion.
    """
    if r.prediction not in ("epsilon", "v_prediction"):
        raise UsageError(f"pndm mixes model outputs and takes epsilon or v_prediction, not {r.prediction!r}.")
    return _plms(r) if r.options["skip_prk_steps"] else _prk(r)


def _transfer(r: Request, alpha_bar: Float64, t: int, before: int) -> tuple[float, float]:
    """x at `before` in terms of [x at t, mixed output]: equation 9."""
    here, there = at(r, alpha_bar, t), at_or_final(r, alpha_bar, before)
    if here == 0:
        raise UsageError("pndm is not defined at zero terminal SNR; use --sampler ddim, or euler.")
    (alpha, sigma), (_, sigma2) = split(here), split(there)
    scale = math.sqrt(there / here)
    gain = -(there - here) / (here * sigma2 + math.sqrt(here * (1 - here) * there))
    if r.prediction == "v_prediction":
        return scale + gain * sigma, gain * alpha
    return scale, gain


def _plms(r: Request) -> SamplerTable:
    """The second timestep is visited twice, to correct the first step from where it began."""
    alpha_bar = schedules.alpha_bar(r.options).astype(np.float64)
    spaced = integer_grid(r)
    timesteps = [*spaced[:1], *spaced[1:2], *spaced[1:]] if len(spaced) > 1 else list(spaced)
    rows, stride = Rows(r), r.train // r.steps
    first = (1.0, 0.0)
    for call, t in enumerate(int(t) for t in timesteps[r.begin :]):
        if call == 1:  # x1 = scale * x0 + gain * m0, so x0 is known, and one step averages both outputs
            scale, gain = _transfer(r, alpha_bar, t + stride, t)
            x0 = np.array([1 / first[0], 0.0, -first[1] / first[0]])
            update = scale * x0 + gain * np.array([0.0, 1 / 2, 1 / 2])
        else:
            scale, gain = _transfer(r, alpha_bar, t, t - stride)
            first = (scale, gain) if call == 0 else first
            update = np.array([scale, *(gain * c for c in _plms_mixture(call))])
        alpha, sigma = split(at(r, alpha_bar, t))
        rows.add(t, ratio(alpha, sigma), update=update.tolist(), denoised=clean_of(r.prediction, alpha, sigma))
    return rows.table(init_noise_sigma=1.0, start=start_of(r, alpha_bar, timesteps))


def _plms_mixture(call: int) -> Sequence[float]:
    """Weights of the newest outputs, newest first; the output of call 1 is never used again."""
    if call == 0:
        return ADAMS_BASHFORTH[0]
    weights = list(ADAMS_BASHFORTH[min(call, 4) - 1])
    skipped = call - 1  # how many calls ago call 1 was
    return [*weights[:skipped], 0.0, *weights[skipped:]] if skipped < len(weights) else weights


def _prk(r: Request) -> SamplerTable:
    raise NotImplementedError
