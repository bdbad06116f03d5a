"""Euler's family: straight steps in the exploding frame.

There x = clean + sigma * noise, and c_in = 1 / sqrt(1 + sigma^2) gives the denoiser a sample of unit variance.

Ref: Karras et al. 2022, arXiv:2206.00364, algorithm 1 and Table 1.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError
from sdopt.samplers.grids import Grid, schedule_of, sigma_grid
from sdopt.samplers.prediction import X, clean_of, noise_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable

Float64 = NDArray[np.float64]


def euler(r: Request) -> SamplerTable:
    """Euler's table: x + (sigma' - sigma) dx/dsigma, and dx/dsigma is the noise."""
    grid, rows = sigma_grid(r), Rows(r)
    for k in range(r.begin, len(grid)):
        sigma, after = grid.sigmas[k], grid.sigmas[k + 1]
        step = X + (after - sigma) * noise_of(r.prediction, 1.0, sigma)
        rows.add(
            grid.timesteps[k], (1.0, sigma), c_in=c_in(sigma), step=step, denoised=clean_of(r.prediction, 1.0, sigma)
        )
    return rows.table(init_noise_sigma=widest(r, grid), end=(1.0, grid.sigmas[-1]))


def euler_a(r: Request) -> SamplerTable:
    """Euler's ancestral table: step to a lower level than asked for, then add noise up to it.

    Ref: Song et al. 2021, arXiv:2010.02502, equation 16 with eta = 1, in the exploding frame.
    """
    grid, rows = sigma_grid(r), Rows(r)
    for k in range(r.begin, len(grid)):
        sigma = grid.sigmas[k]
        down, up = ancestral(sigma, grid.sigmas[k + 1])
        step = X + (down - sigma) * noise_of(r.prediction, 1.0, sigma)
        clean = clean_of(r.prediction, 1.0, sigma)
        rows.add(grid.timesteps[k], (1.0, sigma), c_in=c_in(sigma), step=step, noise=up, draws=True, denoised=clean)
    return rows.table(init_noise_sigma=widest(r, grid), end=(1.0, grid.sigmas[-1]))


def ancestral(sigma: float, after: float) -> tuple[float, float]:
    """(down, up) with down^2 + up^2 = after^2: where the deterministic part ends, and the noise added there."""
    return after * after / sigma, after * math.sqrt(max(1 - (after / sigma) ** 2, 0.0))


def lms(r: Request) -> SamplerTable:
    """The linear multistep table: the noise of up to four calls, extrapolated by a polynomial in sigma and integrated.

    In image to image diffusers takes the polynomial of a run from the start and leaves out the terms it has no history
    for; so do we.
    """
    o = r.options
    if schedule_of(o) == "karras":  # diffusers reads sigma_min and sigma_max for the other schedules only
        r = replace(r, options={**o, "sigma_min": None, "sigma_max": None})
    grid, rows = sigma_grid(r), Rows(r)
    for k in range(r.begin, len(grid)):
        sigma = grid.sigmas[k]
        nodes = grid.sigmas[k - min(k + 1, 4) + 1 : k + 1][::-1]
        weights = integrated_lagrange(nodes, sigma, grid.sigmas[k + 1])[: k - r.begin + 1]
        rows.add(
            grid.timesteps[k],
            (1.0, sigma),
            c_in=c_in(sigma),
            keep=noise_of(r.prediction, 1.0, sigma),
            update=[1.0, *weights],
            denoised=clean_of(r.prediction, 1.0, sigma),
        )
    return rows.table(init_noise_sigma=widest(r, grid), end=(1.0, grid.sigmas[-1]))


def integrated_lagrange(nodes: Float64, start: float, end: float) -> list[float]:
    """The integral from `start` to `end` of each Lagrange polynomial of up to four nodes, exact by Gauss's two points.

    Raises: UsageError when two nodes are equal.
    """
    if len(set(nodes.tolist())) < len(nodes):
        raise UsageError("lms: two steps have the same noise level; use fewer steps or another schedule.")
    half = (end - start) / 2
    tau = start + half * (1 + np.array([-1, 1]) / math.sqrt(3))
    basis = [
        np.prod([(tau - other) / (node - other) for other in nodes[np.arange(len(nodes)) != i]], axis=0, initial=1.0)
        for i, node in enumerate(nodes)
    ]
    return [float(half * np.sum(values * np.ones(2))) for values in basis]


def c_in(sigma: float) -> float:
    """What scales the sample to unit variance for the denoiser."""
    return 1 / math.sqrt(1 + sigma * sigma)


def widest(r: Request, grid: Grid) -> float:
    """The standard deviation of the first sample; leading spacing starts below pure noise and adds the image's."""
    sigma = float(grid.sigmas.max())
    return sigma if r.options["timestep_spacing"] in ("linspace", "trailing") else math.sqrt(sigma * sigma + 1)
