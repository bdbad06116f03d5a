"""Samplers of consistency-distilled models: each call jumps to the clean sample, and noise is put back."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError
from sdopt.samplers import schedules
from sdopt.samplers.ddim import at, split
from sdopt.samplers.grids import custom_timesteps
from sdopt.samplers.prediction import X, clean_of, noise_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable


def lcm(r: Request) -> SamplerTable:
    """The latent consistency table: the consistency function of the clean sample, then fresh noise, but not at the end.

    Ref: Luo et al. 2023, arXiv:2310.04378; boundary conditions of Song et al. 2023, arXiv:2303.01469, equation 5.
    """
    alpha_bar, timesteps = schedules.alpha_bar(r.options).astype(np.float64), distilled_timesteps(r)
    rows, n = Rows(r), len(timesteps)
    for k in range(r.begin, n):
        t, last = int(timesteps[k]), k == n - 1
        alpha, sigma = split(at(r, alpha_bar, t))
        clean = clean_of(r.prediction, alpha, sigma)
        c_skip, c_out = _boundary(t * float(r.options["timestep_scaling"]))
        denoised = c_out * clean + c_skip * X
        alpha2, sigma2 = (1.0, 0.0) if last else split(at(r, alpha_bar, int(timesteps[k + 1])))
        rows.add(t, (alpha, sigma), step=alpha2 * denoised, noise=sigma2, draws=not last, denoised=denoised)
    return rows.table(init_noise_sigma=1.0, end=(1.0, 0.0))


def _boundary(t: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """(c_skip, c_out): the identity at t = 0."""
    n2 = t * t + sigma_data * sigma_data
    return sigma_data * sigma_data / n2, t / math.sqrt(n2)


def tcd(r: Request) -> SamplerTable:
    """The trajectory consistency table: jump to timestep (1 - eta) t' and add noise up to t'. eta = 0 is deterministic.

    Ref: Zheng et al. 2024, arXiv:2402.19159 (strategic stochastic sampling; eta is its gamma).
    """
    eta = r.eta or 0.0
    alpha_bar, timesteps = schedules.alpha_bar(r.options).astype(np.float64), distilled_timesteps(r)
    rows, n = Rows(r), len(timesteps)
    for k in range(r.begin, n):
        t, last = int(timesteps[k]), k == n - 1
        after = 0 if last else int(timesteps[k + 1])
        alpha, sigma = split(at(r, alpha_bar, t))
        aim = at(r, alpha_bar, math.floor((1 - eta) * after))
        keep = 1.0 if last or eta == 0 else at(r, alpha_bar, after) / aim
        alpha_s, sigma_s = split(aim)
        clean, noise = clean_of(r.prediction, alpha, sigma), noise_of(r.prediction, alpha, sigma)
        rows.add(
            t,
            (alpha, sigma),
            step=math.sqrt(keep) * (alpha_s * clean + sigma_s * noise),
            noise=math.sqrt(1 - keep),
            draws=eta > 0 and not last,
            denoised=clean,
        )
    return rows.table(init_noise_sigma=1.0, end=split(at(r, alpha_bar, 0)))


def distilled_timesteps(r: Request) -> NDArray[np.int64]:
    """Timesteps out of the `original_inference_steps` that the model was distilled on, spread evenly.

    Raises: UsageError for more steps than those.
    """
    if r.timesteps is not None:
        return np.array(custom_timesteps(r, integers=True), dtype=np.int64)
    original = int(r.options["original_inference_steps"])
    kept = int(original * r.fraction)
    if r.steps > kept or original > r.train:
        part = "" if r.fraction == 1 else f" and strength {r.fraction} leaves {kept} of them"
        raise UsageError(
            f"{r.name}: {r.steps} steps are too many; the model was distilled on original_inference_steps {original} "
            f"of {r.train} timesteps{part}. Use {min(kept, r.train)} or fewer."
        )
    grid = np.arange(1, kept + 1) * (r.train // original) - 1
    return grid[::-1][np.floor(np.linspace(0, kept, r.steps, endpoint=False)).astype(np.int64)]
