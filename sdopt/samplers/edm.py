"""EDM: models trained with Karras's preconditioning; the sample is in the exploding frame.

clean = c_skip x + c_out output, c_in = 1 / sqrt(sigma^2 + sigma_data^2), timestep = log(sigma) / 4.
Ref: Karras et al. 2022, arXiv:2206.00364, Table 1, column "Ours".
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError
from sdopt.samplers import schedules
from sdopt.samplers.dpm import multistep_table, solver_options
from sdopt.samplers.grids import Grid
from sdopt.samplers.prediction import OUTPUT, Pair, X
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable

Float64 = NDArray[np.float64]


def edm_euler(r: Request) -> SamplerTable:
    """Euler's table on EDM's preconditioning."""
    grid, rows = edm_grid(r, euler=True), Rows(r)
    for k in range(r.begin, len(grid)):
        sigma, after = grid.sigmas[k], grid.sigmas[k + 1]
        clean, c_in = precondition(r, sigma)
        step = X + (after - sigma) / sigma * (X - clean)
        rows.add(grid.timesteps[k], (1.0, sigma), c_in=c_in, step=step, denoised=clean)
    return rows.table(init_noise_sigma=widest(r), end=(1.0, grid.sigmas[-1]))


def edm_dpm(r: Request) -> SamplerTable:
    """DPM-Solver++ multistep's table on EDM's preconditioning."""
    algorithm, solver = solver_options(r)
    if not algorithm.endswith("++") or (algorithm.startswith("sde") and int(r.options["solver_order"]) == 3):
        raise UsageError(
            f"{r.name} has algorithm_type dpmsolver++, and sde-dpmsolver++ up to solver_order 2, not {algorithm!r} "
            f"of order {r.options['solver_order']}."
        )
    grid = edm_grid(r, euler=False)

    def frame(k: int) -> tuple[Pair, Pair, float]:
        clean, c_in = precondition(r, grid.sigmas[k])
        return clean, clean, c_in

    level_at = [(1.0, float(sigma)) for sigma in grid.sigmas]
    return multistep_table(r, grid, level_at, algorithm, solver, frame, init_noise_sigma=widest(r))


def precondition(r: Request, sigma: float) -> tuple[Pair, float]:
    """The clean sample in terms of [x, output], and c_in."""
    data = float(r.options["sigma_data"])
    n2 = sigma * sigma + data * data
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    if r.prediction not in signs:
        raise UsageError(f"{r.name} takes prediction_type epsilon or v_prediction, not {r.prediction!r}.")
    return data * data / n2 * X + signs[r.prediction] * sigma * data / math.sqrt(n2) * OUTPUT, 1 / math.sqrt(n2)


def widest(r: Request) -> float:
    """The standard deviation of the first sample: the noise and the image's own."""
    return math.sqrt(float(r.options["sigma_max"]) ** 2 + 1)


def edm_grid(r: Request, *, euler: bool) -> Grid:
    """Sigmas between sigma_max and sigma_min; their timesteps are log(sigma) / 4.

    diffusers' two EDM schedulers differ: Euler's computes in float64, and its "sigma_min" repeats the last sigma.
    """
    o = r.options
    high, low = float(o["sigma_max"]), float(o["sigma_min"])
    if o["sigma_schedule"] == "karras":
        ramp = None if euler else schedules.linspace32(0, 1, r.steps)
        sigmas = schedules.karras(high, low, r.steps, float(o["rho"]), ramp=ramp)
    elif o["sigma_schedule"] == "exponential":
        ramp = schedules.linspace32(math.log(low), math.log(high), r.steps)
        sigmas = np.exp(ramp)[::-1].astype(np.float64)
    else:
        raise UsageError(f"sigma_schedule {o['sigma_schedule']!r} is unknown; use one of karras, exponential.")
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    smallest = sigmas[-1] if euler else low
    last = smallest if o["final_sigmas_type"] == "sigma_min" else 0.0
    return Grid(0.25 * np.log(sigmas), np.append(sigmas, np.float32(last)))
