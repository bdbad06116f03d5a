"""Second-order single steps in the exploding frame: Heun, and DPM-Solver-2 as k-diffusion writes it.

Every step but the last calls the denoiser twice and begins twice at the same sample S. The first call leaves
x1 = S + (middle - sigma) m0, so the second knows S = x1 - (middle - sigma) m0.

Ref: Karras et al. 2022, arXiv:2206.00364, algorithm 1 (Heun); Lu et al. 2022, arXiv:2206.00927, algorithm 1.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sdopt.samplers import schedules
from sdopt.samplers.euler import ancestral, c_in, widest
from sdopt.samplers.grids import Grid, sigma_grid
from sdopt.samplers.prediction import clean_of, noise_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def heun(r: Request) -> SamplerTable:
    """Heun's table: the trapezoid rule; the second call is made where Euler's step ends."""
    grid = sigma_grid(r)
    rows, n = Rows(r), len(grid)
    for k in range(r.begin // 2, n):
        sigma, after = grid.sigmas[k], grid.sigmas[k + 1]
        dt = after - sigma
        _call(rows, grid.timesteps[k], sigma, [1.0, dt])
        if k < n - 1:  # S + dt (m0 + m1) / 2
            _call(rows, grid.timesteps[k + 1], after, [1.0, dt / 2, -dt / 2])
    return _finish(rows, grid)


def dpm2(r: Request) -> SamplerTable:
    """KDPM2's table: the midpoint rule; the second call is made at the geometric mean of both levels."""
    grid = sigma_grid(r)
    middle = _geometric_mean(grid.sigmas[:-1], grid.sigmas[1:])
    rows, n = Rows(r), len(grid)
    between = _timesteps_between(r, middle)
    for k in range(r.begin // 2, n):
        sigma, after = grid.sigmas[k], grid.sigmas[k + 1]
        timestep = _karras_rounds(r, grid.timesteps[k])
        _call(rows, timestep, sigma, [1.0, middle[k] - sigma])
        if k < n - 1:
            _call(rows, between[k], middle[k], [1.0, after - sigma, -(middle[k] - sigma)])
    return _finish(rows, grid)


def dpm2_a(r: Request) -> SamplerTable:
    """KDPM2 ancestral's table: the midpoint rule down to a lower level, then noise; drawn in the second call only."""
    grid = sigma_grid(r)
    split = [ancestral(a, b) for a, b in pairwise(grid.sigmas)]
    middle = _geometric_mean(grid.sigmas[:-1], np.array([down for down, _ in split]))
    rows, n = Rows(r), len(grid)
    between = _timesteps_between(r, middle)
    for k in range(r.begin // 2, n):
        sigma, (down, up) = grid.sigmas[k], split[k]
        timestep = _karras_rounds(r, grid.timesteps[k])
        _call(rows, timestep, sigma, [1.0, middle[k] - sigma])
        if k < n - 1:
            _call(rows, between[k], middle[k], [1.0, down - sigma, -(middle[k] - sigma)], noise=up, draws=True)
    return _finish(rows, grid)


def _call(
    rows: Rows, timestep: float, sigma: float, update: list[float], *, noise: float = 0.0, draws: bool = False
) -> None:
    """One call at `sigma`, which keeps the noise that it finds."""
    prediction = rows.request.prediction
    rows.add(
        timestep,
        (1.0, sigma),
        c_in=c_in(sigma),
        keep=noise_of(prediction, 1.0, sigma),
        update=update,
        noise=noise,
        draws=draws,
        denoised=clean_of(prediction, 1.0, sigma),
    )


def _finish(rows: Rows, grid: Grid) -> SamplerTable:
    return rows.table(init_noise_sigma=widest(rows.request, grid), end=(1.0, float(grid.sigmas[-1])))


def _geometric_mean(a: Float64, b: Float64) -> Float64:
    """sqrt(a b), computed in float32 as diffusers does; 0 where b is 0."""
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a.astype(np.float32)), np.log(b.astype(np.float32))
        return np.exp(log_a - (log_a - log_b) * np.float32(0.5)).astype(np.float64)


def _timesteps_between(r: Request, middle: Float64) -> Float64:
    """The timesteps that name the middle levels to the denoiser."""
    log_sigmas = np.log(schedules.sigmas_of(schedules.alpha_bar(r.options)))
    return schedules.sigma_to_t(middle.astype(np.float32), log_sigmas).astype(np.float32).astype(np.float64)


def _karras_rounds(r: Request, timestep: float) -> float:
    """KDPM2 rounds the timesteps of Karras sigmas; of no other."""
    return round(timestep) if r.options["use_karras_sigmas"] else timestep
