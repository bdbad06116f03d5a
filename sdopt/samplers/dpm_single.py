"""DPM-Solver and DPM-Solver++, singlestep: blocks of one, two or three calls, each from the block's own beginning.

Ref: Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2; arXiv:2211.01095, algorithm 1 (2S).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdopt.errors import UsageError
from sdopt.samplers.dpm import (
    Expansion,
    expansion,
    levels,
    log_ratio,
    refuse_standstill,
    solver_options,
    vp_frame,
)
from sdopt.samplers.grids import solver_grid
from sdopt.samplers.prediction import Level, Pair
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable


def dpm_singlestep(r: Request) -> SamplerTable:
    """DPM-Solver's singlestep table: blocks of orders 1, 2 and 3, all steps of a block starting where it began.

    A step of a block is x' = scale S + weights @ [m0, m1, m2], S the sample where the block began, so the next step
    knows S = (x - weights @ [m1, m2, m3]) / scale.

    Raises: UsageError for the SDE algorithms: a row has no place for the noise of an earlier call.
    """
    algorithm, solver = solver_options(r)
    if algorithm.startswith("sde"):
        raise UsageError(
            f"algorithm_type {algorithm!r} cannot be used with {r.name}: a step would need the noise of the step "
            "before. Use --sampler dpmpp_2m_sde."
        )
    grid, rows = solver_grid(r, spacing="linspace"), Rows(r)
    level_at, orders = levels(r, grid), block_orders(r)
    frame = vp_frame(r, level_at, algorithm)
    start = np.array([1.0, 0.0, 0.0, 0.0])  # S in terms of [x, m0, m1, m2]
    for k in range(r.begin, len(grid)):
        refuse_standstill(r, grid, k)
        order = min(orders[k], k - r.begin + 1)
        e = expansion(algorithm, level_at[k + 1], level_at[k - order + 1])
        weights = _combine(e, level_at, k, order, solver)
        if order == 1:
            start = np.array([1.0, 0.0, 0.0, 0.0])
        update = e.scale * start + np.array([0.0, *weights])
        clean, keep, c_in = frame(k)
        rows.add(
            grid.timesteps[k],
            level_at[k],
            sigma=grid.sigmas[k],
            c_in=c_in,
            keep=keep,
            update=list(update[: order + 1]),
            denoised=clean,
        )
        if k + 1 < len(grid):
            start = np.array([1.0, 0.0, *-weights[:2]]) / e.scale
    return rows.table(init_noise_sigma=1.0, end=level_at[-1])


def _combine(e: Expansion, level_at: Sequence[Level], k: int, order: int, solver: str) -> Pair:
    """The weights of [m0, m1, m2], newest first, in one step that began order - 1 calls ago."""
    m = np.eye(3)[:order][::-1]  # oldest first: m[0] where the block began
    weights = e.first * m[0]
    start = level_at[k - order + 1]
    if order == 2:
        r0 = log_ratio(level_at[k], start) / e.h
        return weights + e.second(solver) * (m[1] - m[0]) / r0
    if order == 3:
        r1 = log_ratio(level_at[k - 1], start) / e.h
        r0 = log_ratio(level_at[k], start) / e.h
        early, late = (m[1] - m[0]) / r1, (m[2] - m[0]) / r0
        if solver == "midpoint":
            return weights + e.second("heun") * late
        d1 = (r0 * early - r1 * late) / (r0 - r1)
        d2 = 2 * (late - early) / (r0 - r1)
        return weights + e.second("heun") * d1 + e.third() * d2
    return weights


def block_orders(r: Request) -> list[int]:
    """The order of every step: blocks 1, 2, 3 (or 1, 2), the last ones cut short where lower_order_final asks."""
    n, order = r.steps, int(r.options["solver_order"])
    zero = r.options["final_sigmas_type"] == "zero"
    shorten = bool(r.options["lower_order_final"]) or n % order != 0 or zero
    block = list(range(1, order + 1))
    orders = (block * (n // order + 1))[:n]
    if shorten and n % order == 0 and order > 1:  # a whole last block becomes 1, 2 and 1, or 1 and 1
        orders[-order:] = [*block[:-1], 1]
    if zero:
        orders[-1] = 1
    return orders
