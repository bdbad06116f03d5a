"""Euler's family: straight steps in the exploding frame, where x = clean + sigma * noise and c_in = 1 / sqrt(1 + sigma^2).

Ref: Karras et al. 2022, arXiv:2206.00364, algorithm 1 and Table 1.
"""

from __future__ import annotations

import math

from sdopt.samplers.grids import Grid, sigma_grid
from sdopt.samplers.prediction import X, clean_of, noise_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable


def euler(r: Request) -> SamplerTable:
    """Euler's table: x + (sigma' - sigma) dx/dsigma, and dx/dsigma is the noise."""
    grid, rows = sigma_grid(r), Rows(r)
    for k in range(r.begin, len(grid)):
        sigma, after = grid.sigmas[k], grid.sigmas[k + 1]
        step = X + (after - sigma) * noise_of(r.prediction, 1.0, sigma)
        rows.add(grid.timesteps[k], sigma, c_in=c_in(sigma), step=step, denoised=clean_of(r.prediction, 1.0, sigma))
    return rows.table(init_noise_sigma=widest(r, grid), start=(1.0, grid.sigmas[r.begin]))


def c_in(sigma: float) -> float:
    """What scales the sample to unit variance for the denoiser."""
    return 1 / math.sqrt(1 + sigma * sigma)


def widest(r: Request, grid: Grid) -> float:
    """The standard deviation of the first sample; leading spacing does not start at pure noise, so it adds the image's."""
    sigma = float(grid.sigmas.max())
    return sigma if r.options["timestep_spacing"] in ("linspace", "trailing") else math.sqrt(sigma * sigma + 1)
