"""Flow matching: x = (1 - sigma) clean + sigma noise, and the model predicts noise - clean.

Ref: Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError
from sdopt.samplers import schedules
from sdopt.samplers.grids import Grid, custom_sigmas, custom_timesteps, schedule_of, scheduled
from sdopt.samplers.prediction import OUTPUT, X
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable

Float64 = NDArray[np.float64]


def flow_euler(r: Request) -> SamplerTable:
    """Euler's table along the straight flow; with stochastic_sampling, the clean sample with fresh noise."""
    grid, rows = flow_grid(r), Rows(r)
    stochastic = bool(r.options["stochastic_sampling"])
    for k in range(r.begin, len(grid)):
        sigma, after = grid.sigmas[k], grid.sigmas[k + 1]
        clean = X - sigma * OUTPUT
        rows.add(
            grid.timesteps[k],
            (1 - sigma, sigma),
            sigma=sigma,
            step=(1 - after) * clean if stochastic else X + (after - sigma) * OUTPUT,
            noise=after if stochastic else 0.0,
            draws=stochastic,
            denoised=clean,
        )
    last = grid.sigmas[-1]
    return rows.table(init_noise_sigma=1.0, end=(1 - last, last))


def flow_heun(r: Request) -> SamplerTable:
    """Heun's table along the flow: the trapezoid rule; the second call is made where Euler's step ends.

    Both calls begin at the same sample S. The first one leaves x1 = S + dt m0, so that the second knows S.
    Ref: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    grid, rows = flow_grid(r), Rows(r)
    for k in range(r.begin // 2, len(grid)):
        dt = grid.sigmas[k + 1] - grid.sigmas[k]
        _keep(rows, grid, k, [1.0, dt])
        if k < len(grid) - 1:  # S + dt (m0 + m1) / 2
            _keep(rows, grid, k + 1, [1.0, dt / 2, -dt / 2])
    last = grid.sigmas[-1]
    return rows.table(init_noise_sigma=1.0, end=(1 - last, last))


def _keep(rows: Rows, grid: Grid, k: int, update: list[float]) -> None:
    """One call at level `k` of the grid, which keeps the model's output."""
    sigma = grid.sigmas[k]
    rows.add(
        grid.timesteps[k], (1 - sigma, sigma), sigma=sigma, keep=OUTPUT, update=update, denoised=X - sigma * OUTPUT
    )


SHIFTS = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def dynamic_mu(config: Mapping[str, Any], tokens: int) -> float:
    """The logarithm of the shift for a picture of so many tokens: a straight line through two sizes of the config.

    More tokens need more noise to hide the same picture. Ref: Esser et al. 2024, arXiv:2403.03206, section 5.3.2;
    the defaults are those of diffusers' pipelines.
    """
    o = {name: float(config.get(name, default)) for name, default in SHIFTS.items()}
    slope = (o["max_shift"] - o["base_shift"]) / (o["max_image_seq_len"] - o["base_image_seq_len"])
    return slope * tokens + o["base_shift"] - slope * o["base_image_seq_len"]


def flow_grid(r: Request) -> Grid:
    """Flow sigmas from 1 towards 0, shifted for the size of the image; a timestep is sigma * num_train_timesteps."""
    o = r.options
    sigmas = _shift(r, _unshifted(r))
    if o.get("shift_terminal"):
        sigmas = schedules.stretched(sigmas, float(o["shift_terminal"]))
    schedule = schedule_of(o)
    if schedule:
        sigmas = scheduled(o, schedule, float(sigmas[0]), float(sigmas[-1]), r.steps)
    levels = sigmas.astype(np.float32)
    last = 0.0
    inverted = bool(o.get("invert_sigmas"))
    if inverted:
        levels, last = 1 - levels, 1.0
    timesteps = np.asarray(levels * np.float32(r.train), dtype=np.float64)
    if r.timesteps is not None and not inverted:
        timesteps = np.array(custom_timesteps(r, integers=False), dtype=np.float64)
    return Grid(timesteps, np.append(levels.astype(np.float64), last))


def _unshifted(r: Request) -> Float64:
    if r.sigmas is not None:
        return custom_sigmas(r, highest=1.0)
    if r.timesteps is not None:
        return np.array(custom_timesteps(r, integers=False)) / r.train
    ends = np.array([1, 1 / np.float32(r.train)], dtype=np.float32)
    if not r.options.get("use_dynamic_shifting"):  # diffusers shifts the ends when it is made, and all of it again here
        ends = schedules.shifted(ends.astype(np.float64), float(r.options["shift"])).astype(np.float32)
    return np.linspace(float(ends[0]) * r.train, float(ends[1]) * r.train, r.steps) / r.train


def _shift(r: Request, sigmas: Float64) -> Float64:
    o = r.options
    if not o.get("use_dynamic_shifting"):
        return schedules.shifted(sigmas, float(o["shift"]))
    if r.mu is None:
        raise UsageError("use_dynamic_shifting is true: the shift depends on the size of the image, pass it as mu.")
    return schedules.shifted(sigmas, math.exp(r.mu) if o["time_shift_type"] == "exponential" else r.mu)
