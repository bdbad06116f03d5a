"""DPM-Solver and DPM-Solver++, multistep, deterministic and stochastic, orders 1 to 3.

lambda = log(alpha / sigma) is half the log signal-to-noise ratio; a step of h = lambda(t) - lambda(s) integrates the
kept value against an exponential of lambda exactly. At the last step to sigma 0, h is infinite, and exp(-h) is 0.

Ref: Lu et al. 2022, arXiv:2206.00927 (DPM-Solver); arXiv:2211.01095 (DPM-Solver++).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices
from sdopt.samplers.grids import Grid, solver_grid
from sdopt.samplers.prediction import Level, Pair, clean_of, noise_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
SOLVERS = ("midpoint", "heun")
Frame = Callable[[int], tuple[Pair, Pair, float]]  # row -> clean sample, what is kept, c_in


def level(sigma: float, flow: bool) -> Level:
    """(alpha, sigma) of a noise level: variance-preserving, or the straight line of flow matching.

    Raises: UsageError for a flow sigma that is not below 1: a schedule of the other kind was asked for.
    """
    if flow and sigma >= 1:
        raise UsageError(
            f"use_flow_sigmas is true, and sigma {sigma:g} is not below 1; flow sigmas do not go with karras, "
            'exponential, beta, custom timesteps or final_sigmas_type "sigma_min".'
        )
    if flow:
        return 1 - sigma, sigma
    alpha = 1 / math.sqrt(1 + sigma * sigma)
    return alpha, sigma * alpha


def levels(r: Request, grid: Grid) -> list[Level]:
    """(alpha, sigma) at every sigma of the grid, the final one included."""
    return [level(float(sigma), bool(r.options["use_flow_sigmas"])) for sigma in grid.sigmas]


def log_ratio(to: Level, start: Level) -> float:
    """h = lambda(to) - lambda(start), where lambda = log(alpha / sigma); infinite when `to` has no noise."""
    return math.inf if to[1] == 0 else math.log(to[0] * start[1] / (to[1] * start[0]))


@dataclass(frozen=True)
class Expansion:
    """One exponential-integrator step: x' = scale x + first D0 + second D1 + third D2 + gain noise.

    D0 is what was kept (the clean sample for ++, else the noise), D1 and D2 its divided differences in lambda.
    With phi(u) = e^u - 1, the weights are first = w phi, second = w (phi / u - 1), third = w ((phi - u) / u^2 - 1/2).

    | algorithm       | scale                     | u   | w         | gain                    |
    |-----------------|---------------------------|-----|-----------|-------------------------|
    | dpmsolver       | alpha_t / alpha_s         | h   | -sigma_t  | 0                       |
    | dpmsolver++     | sigma_t / sigma_s         | -h  | -alpha_t  | 0                       |
    | sde-dpmsolver   | alpha_t / alpha_s         | h   | -2sigma_t | sigma_t sqrt(e^2h - 1)  |
    | sde-dpmsolver++ | sigma_t / sigma_s * e^-h  | -2h | -alpha_t  | sigma_t sqrt(1 - e^-2h) |

    Ref: Lu et al. 2022, arXiv:2206.00927 (dpmsolver); arXiv:2211.01095 (++, and both SDE variants).
    """

    h: float
    scale: float
    u: float
    weight: float
    gain: float = 0.0

    @property
    def first(self) -> float:
        """The weight of D0."""
        return self.weight * math.expm1(self.u)

    def second(self, solver: str) -> float:
        """The weight of D1: the midpoint rule, or the exact integral that diffusers calls heun."""
        return self.first / 2 if solver == "midpoint" else self.weight * (math.expm1(self.u) / self.u - 1)

    def third(self) -> float:
        """The weight of D2. For the SDE, diffusers has the half with the wrong sign; so do we, to make its picture."""
        half = -0.5 if self.gain else 0.5
        return self.weight * ((math.expm1(self.u) - self.u) / (self.u * self.u) - half)


def expansion(algorithm: str, to: Level, start: Level) -> Expansion:
    """The step of `algorithm` from `start` to `to`.

    Raises: UsageError where an SDE would have to add noise while the noise level rises.
    """
    h, (alpha, sigma) = log_ratio(to, start), to
    data = algorithm.endswith("++")
    scale = sigma / start[1] if data else alpha / start[0]
    if not algorithm.startswith("sde"):
        return Expansion(h, scale, -h if data else h, -alpha if data else -sigma)
    variance = -math.expm1(-2 * h) if data else math.expm1(2 * h)
    if variance < -1e-6:
        raise UsageError(f"{algorithm} adds noise on the way down; the noise level must not rise at the last step.")
    gain = sigma * math.sqrt(max(variance, 0.0))
    if data:
        return Expansion(h, scale * math.exp(-h), -2 * h, -alpha, gain)
    return Expansion(h, scale, h, -2 * sigma, gain)


def differences(order: int, h: float, *before: float) -> list[Pair]:
    """D0, D1, D2 as weights of [m0, m1, m2], newest first, for multistep; `before` are the earlier steps h0, h1.

    Ref: Lu et al. 2022, arXiv:2211.01095, algorithm 2 (order 2).
    """
    m0, m1, m2 = np.eye(3)
    if order == 1:
        return [m0]
    r0 = before[0] / h
    if order == 2:
        return [m0, (m0 - m1) / r0]
    r1 = before[1] / h
    new, old = (m0 - m1) / r0, (m1 - m2) / r1
    return [m0, new + r0 / (r0 + r1) * (new - old), (new - old) / (r0 + r1)]


def _combine(e: Expansion, d: Sequence[Pair], solver: str) -> Pair:
    """The weights of [m0, m1, m2] in one step; order 3 is always integrated exactly."""
    weights = e.first * d[0]
    if len(d) == 2:
        weights = weights + e.second(solver) * d[1]
    if len(d) == 3:
        weights = weights + e.second("heun") * d[1] + e.third() * d[2]
    return weights


def dpm_multistep(r: Request) -> SamplerTable:
    """DPM-Solver's multistep table: orders 1, 2, 3 warm up from 1, and the last steps fall back again.

    Ref: Lu et al. 2022, arXiv:2211.01095, algorithm 2 (2M).
    """
    algorithm, solver = solver_options(r)
    grid = solver_grid(r, round_cosine=False)
    return multistep_table(r, grid, levels(r, grid), algorithm, solver)


def multistep_table(
    r: Request,
    grid: Grid,
    level_at: Sequence[Level],
    algorithm: str,
    solver: str,
    frame: Frame | None = None,
    init_noise_sigma: float = 1.0,
) -> SamplerTable:
    """The multistep rows over any grid of levels; `frame` replaces the usual conversion of model outputs (EDM)."""
    rows, frame = Rows(r), frame or vp_frame(r, level_at, algorithm)
    h = [0.0, *(log_ratio(b, a) for a, b in pairwise(level_at))]  # h[k + 1]: the length of step k
    for k in range(r.begin, len(grid)):
        refuse_standstill(r, grid, k)
        stands_still = h[k + 1] == 0
        order = 1 if stands_still else multistep_order(r.options, k, len(grid), k - r.begin)
        e = expansion(algorithm, level_at[k + 1], level_at[k])
        earlier = h[k:0:-1][: order - 1]  # the steps before this one, newest first
        weights = _combine(e, differences(order, h[k + 1], *earlier), solver)
        clean, keep, c_in = frame(k)
        rows.add(
            grid.timesteps[k],
            level_at[k],
            sigma=grid.sigmas[k],
            c_in=c_in,
            keep=keep,
            update=[e.scale, *weights[:order]],
            noise=e.gain,
            draws=algorithm.startswith("sde"),
            denoised=clean,
        )
    return rows.table(init_noise_sigma=init_noise_sigma, end=level_at[-1])


def vp_frame(r: Request, level_at: Sequence[Level], algorithm: str) -> Frame:
    """The frame of DPM-Solver: ++ keeps the clean sample, the older algorithm the noise; the sample is not scaled."""

    def frame(k: int) -> tuple[Pair, Pair, float]:
        clean = clean_of(r.prediction, *level_at[k])
        kept = clean if algorithm.endswith("++") else noise_of(r.prediction, *level_at[k])
        return clean, kept, 1.0

    return frame


def multistep_order(options: Mapping[str, Any], k: int, n: int, done: int) -> int:
    """The order of step `k` of `n`, after `done` steps have left history; short runs end with lower orders."""
    short = bool(options["lower_order_final"]) and n < 15
    last = k == n - 1 and (
        bool(options.get("euler_at_final")) or short or options.get("final_sigmas_type", "sigma_min") == "zero"
    )
    if last:
        return 1
    return min(int(options["solver_order"]), done + 1, 2 if k == n - 2 and short else 3)


def refuse_standstill(r: Request, grid: Grid, k: int) -> None:
    """Raises: UsageError where a noise level is repeated before the end, as the next step divides by their distance."""
    if grid.sigmas[k] == grid.sigmas[k + 1] and k + 1 < len(grid):
        raise UsageError(
            f"{r.name}: steps {k} and {k + 1} have the same noise level {grid.sigmas[k]:g}; {len(grid)} steps are too "
            "many for this schedule. Use fewer steps or another schedule."
        )


def solver_options(r: Request) -> tuple[str, str]:
    """(algorithm_type, solver_type), with the names of other solvers read as diffusers reads them.

    Raises: UsageError for names and combinations that do not exist.
    """
    algorithm, solver = str(r.options["algorithm_type"]), str(r.options["solver_type"])
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm
    solver = "midpoint" if solver in ("logrho", "bh1", "bh2") else solver
    if algorithm not in ALGORITHMS:
        raise UsageError(f"algorithm_type {algorithm!r} is unknown; use one of {choices(algorithm, ALGORITHMS)}.")
    if solver not in SOLVERS:
        raise UsageError(f"solver_type {solver!r} is unknown; use one of {choices(solver, SOLVERS)}.")
    if int(r.options["solver_order"]) not in (1, 2, 3):
        raise UsageError(f"solver_order {r.options['solver_order']!r}: {r.name} has orders 1, 2 and 3.")
    if not algorithm.endswith("++") and r.options["final_sigmas_type"] == "zero":
        raise UsageError(
            f"algorithm_type {algorithm!r} cannot end at sigma 0; "
            f'set final_sigmas_type "sigma_min", or algorithm_type "{algorithm}++".'
        )
    if algorithm == "sde-dpmsolver" and int(r.options["solver_order"]) == 3:
        raise UsageError("algorithm_type 'sde-dpmsolver' has orders 1 and 2; use sde-dpmsolver++ for order 3.")
    return algorithm, solver
