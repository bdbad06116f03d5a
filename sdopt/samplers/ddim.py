"""DDIM and DDPM: timesteps are indices into alpha_bar, the sample stays in the variance-preserving frame.

alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar): x = alpha * clean + sigma * noise.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError, choices
from sdopt.samplers import schedules
from sdopt.samplers.grids import integer_grid
from sdopt.samplers.prediction import X, clean_of, noise_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable

Float64 = NDArray[np.float64]


def ddim(r: Request) -> SamplerTable:
    """DDIM's table; eta = 0 is deterministic, eta = 1 adds the noise of DDPM.

    Ref: Song et al. 2021, arXiv:2010.02502, equations 12 and 16.
    """
    alpha_bar, timesteps, eta = _alpha_bar(r), integer_grid(r), r.eta or 0.0
    rows, stride, after = Rows(r), r.train // r.steps, (1.0, 0.0)
    for t in timesteps[r.begin :]:
        here, before = at(r, alpha_bar, t), at_or_final(r, alpha_bar, t - stride)
        (alpha, sigma), after = split(here), split(before)
        alpha2, sigma2 = after
        std = eta * math.sqrt((1 - before) / (1 - here) * (1 - here / before))
        clean, noise = clean_of(r.prediction, alpha, sigma), noise_of(r.prediction, alpha, sigma)
        rows.add(
            t,
            (alpha, sigma),
            step=alpha2 * clean + math.sqrt(max(sigma2**2 - std**2, 0.0)) * noise,
            noise=std,
            draws=eta > 0,
            denoised=clean,
        )
    return rows.table(init_noise_sigma=1.0, end=after)


def ddpm(r: Request) -> SamplerTable:
    """DDPM's table: the posterior mean and a fixed variance.

    Ref: Ho et al. 2020, arXiv:2006.11239, equations 6 and 7.
    """
    alpha_bar, timesteps = _alpha_bar(r), integer_grid(r)
    rows = Rows(r)
    for k, t in enumerate(timesteps[r.begin :], start=r.begin):
        here = at(r, alpha_bar, t)
        before = at(r, alpha_bar, timesteps[k + 1]) if k + 1 < len(timesteps) else 1.0
        alpha, sigma = split(here)
        beta = 1 - here / before
        clean = clean_of(r.prediction, alpha, sigma)
        mean = math.sqrt(before) * beta / (1 - here) * clean + math.sqrt(here / before) * (1 - before) / (1 - here) * X
        draws = bool(t > 0)
        std = _std(r.options["variance_type"], beta, (1 - before) / (1 - here) * beta) if draws else 0.0
        rows.add(t, (alpha, sigma), step=mean, noise=std, draws=draws, denoised=clean)
    return rows.table(init_noise_sigma=1.0, end=(1.0, 0.0))


def _std(variance_type: str, beta: float, posterior: float) -> float:
    """The standard deviation of DDPM's noise; the smallest variance is 1e-20."""
    if variance_type in ("fixed_small", "fixed_small_log"):
        return math.sqrt(max(posterior, 1e-20))
    if variance_type == "fixed_large":
        return math.sqrt(beta)
    known = ("fixed_small", "fixed_small_log", "fixed_large")
    raise UsageError(f"variance_type {variance_type!r} is unknown; use one of {choices(str(variance_type), known)}.")


def _alpha_bar(r: Request) -> Float64:
    return schedules.alpha_bar(r.options).astype(np.float64)


def at(r: Request, alpha_bar: Float64, t: int) -> float:
    """alpha_bar at timestep `t`.

    Raises: UsageError when a spacing with an offset runs past the last trained timestep.
    """
    if t >= len(alpha_bar):
        raise UsageError(
            f"{r.name}: {r.steps} steps with timestep_spacing {r.options['timestep_spacing']!r} and steps_offset "
            f"{r.options['steps_offset']} need timestep {t}, and the model was trained on 0..{len(alpha_bar) - 1}. "
            "Use fewer steps."
        )
    return float(alpha_bar[t])


def at_or_final(r: Request, alpha_bar: Float64, t: int) -> float:
    """alpha_bar at `t`, and before timestep 0 either 1 or alpha_bar[0]: the option set_alpha_to_one."""
    if t < 0:
        return 1.0 if r.options["set_alpha_to_one"] else float(alpha_bar[0])
    return at(r, alpha_bar, t)


def split(alpha_bar: float) -> tuple[float, float]:
    """(alpha, sigma) of the variance-preserving frame."""
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
