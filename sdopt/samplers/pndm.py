"""PNDM: a linear multistep method on the model outputs, in the variance-preserving frame.

Ref: Liu et al. 2022, arXiv:2202.09778, equation 9 (the transfer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError
from sdopt.samplers import schedules
from sdopt.samplers.ddim import at, at_or_final, split
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
    timesteps = [*spaced[:2], *spaced[1:]]
    rows, stride = Rows(r), r.train // r.steps
    first_scale, first_gain = 1.0, 0.0
    for call, t in enumerate(int(t) for t in timesteps[r.begin :]):
        if call == 1:  # x1 = scale * x0 + gain * m0, so x0 is known, and one step averages both outputs
            scale, gain = _transfer(r, alpha_bar, t + stride, t)
            x0 = np.array([1 / first_scale, 0.0, -first_gain / first_scale])
            update = scale * x0 + gain * np.array([0.0, 1 / 2, 1 / 2])
        else:
            scale, gain = _transfer(r, alpha_bar, t, t - stride)
            if call == 0:
                first_scale, first_gain = scale, gain
            update = np.array([scale, *(gain * c for c in _plms_mixture(call))])
        alpha, sigma = split(at(r, alpha_bar, t))
        rows.add(t, (alpha, sigma), update=update.tolist(), denoised=clean_of(r.prediction, alpha, sigma))
    return rows.table(init_noise_sigma=1.0, end=split(at_or_final(r, alpha_bar, int(timesteps[-1]) - stride)))


def _plms_mixture(call: int) -> Sequence[float]:
    """Weights of the newest outputs, newest first; the output of call 1 is never used again."""
    if call == 0:
        return ADAMS_BASHFORTH[0]
    weights = list(ADAMS_BASHFORTH[min(call, 4) - 1])
    skipped = call - 1  # how many calls ago call 1 was
    return [*weights[:skipped], 0.0, *weights[skipped:]] if skipped < len(weights) else weights


def _prk(r: Request) -> SamplerTable:
    """Twelve calls of Runge-Kutta over the first three steps, four calls a step, then the multistep method.

    Within a step every stage starts again from the sample S where the step began; S is solved from the stage before:
    x = scale S + gain m, so S = (x - gain m) / scale.
    """
    if r.steps < 4:
        raise UsageError(f"pndm with its warm-up takes 4 steps or more, got {r.steps}; set skip_prk_steps to true.")
    alpha_bar = schedules.alpha_bar(r.options).astype(np.float64)
    stages, multistep = _prk_timesteps(r)
    timesteps = [*stages, *multistep]
    rows, stride = Rows(r), r.train // r.steps
    start = np.array([1.0])  # S in terms of [x, kept before, ...]
    for call, t in enumerate(timesteps[r.begin :]):
        if call < len(stages):
            stage = call % 4
            if stage == 0:
                start = np.array([1.0])
            before = t if stage % 2 else t - stride // 2
            first_stage = call - stage  # counted as if nothing was skipped, as diffusers counts
            scale, gain = _transfer(r, alpha_bar, stages[first_stage], before)
            update = scale * _start_row(start, 4) + gain * np.array([0.0, *RUNGE_KUTTA[stage]])
            start = np.array([1.0, -gain]) / scale
        else:
            scale, gain = _transfer(r, alpha_bar, t, t - stride)
            update = np.array([scale, *(gain * w for w in _prk_mixture(call))])
        alpha, sigma = split(at(r, alpha_bar, t))
        rows.add(t, (alpha, sigma), update=update.tolist(), denoised=clean_of(r.prediction, alpha, sigma))
    return rows.table(init_noise_sigma=1.0, end=split(at_or_final(r, alpha_bar, int(timesteps[-1]) - stride)))


# What each stage uses of the newest outputs; the fourth averages all four.
RUNGE_KUTTA = ((1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def _start_row(start: Float64, history: int) -> Float64:
    """S in terms of [x, this call's output, kept before, ...]: this call's output is not part of it."""
    row = np.zeros(history + 1)
    row[0] = start[0]
    row[2 : len(start) + 1] = start[1:]
    return row


def _prk_timesteps(r: Request) -> tuple[list[int], list[int]]:
    """The timesteps of the twelve stages, and those of the steps after.

    The four stages of a step are at its timestep, twice in its middle, and at the next timestep.
    """
    timesteps = [int(t) for t in integer_grid(r)]
    half = r.train // r.steps // 2
    stages: list[int] = []
    for timestep, following in pairwise(timesteps[:4]):
        middle = following + half
        stages += [timestep, middle, middle, following]
    return stages, timesteps[3:]


def _prk_mixture(call: int) -> Sequence[float]:
    """Adams-Bashforth over the first outputs of the three Runge-Kutta steps and all outputs since."""
    firsts = (0, 4, 8)
    ages = [call - earlier for earlier in (*firsts, *range(12, call + 1))]  # how many calls ago each output was
    newest = sorted(ages)[:4]
    weights = np.zeros(max(newest) + 1)
    weights[newest] = ADAMS_BASHFORTH[len(newest) - 1]
    return weights.tolist()


def ipndm(r: Request) -> SamplerTable:
    """Improved PNDM's table: it has a schedule of its own, and warms up from order 1 instead of Runge-Kutta.

    Ref: Zhang & Chen 2023, arXiv:2204.13902. The schedule and the v prediction are k-diffusion's.
    """
    ramp = np.array([*schedules.linspace32(1, 0, r.steps + 1)[:-1], 0], dtype=np.float32)
    trained = r.options["trained_betas"]
    sigma = np.sin(ramp * np.float32(math.pi / 2)) ** 2 if trained is None else np.array(trained, dtype=np.float32)
    alpha = np.sqrt(1 - sigma**2)
    timesteps = (np.arctan2(sigma, alpha) / np.float32(math.pi) * 2)[:-1].astype(np.float64)
    alpha, sigma = alpha.astype(np.float64), sigma.astype(np.float64)
    rows = Rows(r)
    for k in range(r.begin, len(timesteps)):
        a, s, a2, s2 = alpha[k], sigma[k], alpha[k + 1], sigma[k + 1]
        scale, gain = (a2 / a, s2 - a2 * s / a) if a > 1e-8 else (0.0, s2)  # pure noise: nothing clean to keep
        weights = ADAMS_BASHFORTH[min(k - r.begin, 3)]
        rows.add(
            timesteps[k],
            (a, s),
            keep=np.array([s, a]),
            update=[scale, *(gain * w for w in weights)],
            denoised=np.array([a, -s]),
        )
    return rows.table(init_noise_sigma=1.0, end=(float(alpha[-1]), float(sigma[-1])))
