"""UniPC: a predictor whose steps are corrected, without another call, once the next model output is known.

Row k first corrects the sample that it was given, then predicts the next one. The correction changes the prediction's
weights of the kept values only: corrected = x + weights @ [m_k, m_k-1, ...].

Ref: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2; bh1 is B(h) = h, bh2 is B(h) = e^h - 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices
from sdopt.samplers.dpm import levels, log_ratio, refuse_standstill
from sdopt.samplers.grids import unipc_grid
from sdopt.samplers.prediction import Level, clean_of, noise_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable

Float64 = NDArray[np.float64]


def unipc(r: Request) -> SamplerTable:
    """UniPC's table for any solver_order, bh1 or bh2, keeping the clean sample or (predict_x0 false) the noise."""
    solver = _solver(r)
    grid, rows = unipc_grid(r), Rows(r)
    level_at = levels(r, grid)
    n, width = len(grid), int(r.options["solver_order"]) + 1
    previous = np.zeros(width)  # what the correction would add, in terms of the next row's [m0, m1, ...]
    for k in range(r.begin, n):
        refuse_standstill(r, grid, k)
        order = _order(r, k, n) if grid.sigmas[k] != grid.sigmas[k + 1] else 1
        step = _Step(level_at, k, order, solver, bool(r.options["predict_x0"]))
        corrects = k > r.begin and k - 1 not in tuple(r.options["disable_corrector"])
        weights = step.predict(width) + (step.scale * previous if corrects else 0.0)
        clean = clean_of(r.prediction, *level_at[k])
        keep = clean if r.options["predict_x0"] else noise_of(r.prediction, *level_at[k])
        update = [step.scale, *weights[: k - r.begin + 1]]
        rows.add(grid.timesteps[k], level_at[k], sigma=grid.sigmas[k], keep=keep, update=update, denoised=clean)
        previous = step.correct(width) if k < n - 1 else previous
    return rows.table(init_noise_sigma=1.0, end=level_at[-1])


@dataclass(frozen=True)
class _Step:
    """One step of some order from level k to k + 1; weights are of [m0, m1, ...], newest first."""

    level_at: list[Level]
    k: int
    order: int
    solver: str
    data: bool

    @property
    def scale(self) -> float:
        """The weight of the sample."""
        (alpha, sigma), (alpha2, sigma2) = self.level_at[self.k], self.level_at[self.k + 1]
        return sigma2 / sigma if self.data else alpha2 / alpha

    @property
    def _h(self) -> float:
        return log_ratio(self.level_at[self.k + 1], self.level_at[self.k])

    @property
    def _u(self) -> float:
        return -self._h if self.data else self._h

    @property
    def _gain(self) -> float:
        """-alpha (or -sigma) of the level stepped to."""
        return -self.level_at[self.k + 1][0 if self.data else 1]

    @property
    def _b(self) -> float:
        return self._u if self.solver == "bh1" else math.expm1(self._u)

    def _ratios(self) -> list[float]:
        """r_i = (lambda of i steps ago - lambda now) / h, then 1 for the level stepped to."""
        now = self.level_at[self.k]
        return [log_ratio(self.level_at[self.k - i], now) / self._h for i in range(1, self.order)] + [1.0]

    def _rhos(self, n: int) -> Float64:
        """The weights of the first `n` differences, that integrate polynomials of degree n - 1 exactly."""
        if n == 1:
            return np.array([0.5])
        u, phi, factorial, right = self._u, math.expm1(self._u) / self._u - 1, 1.0, list[float]()
        for i in range(1, n + 1):
            right.append(phi * factorial / self._b)
            factorial *= i + 1
            phi = phi / u - 1 / factorial
        powers = np.power(np.array(self._ratios()[:n])[None], np.arange(n)[:, None])
        return np.asarray(np.linalg.solve(powers, np.array(right)))

    def _differences(self, width: int) -> Float64:
        """(m_i - m_0) / r_i for the values kept before."""
        unit = np.eye(width)
        parts = [(unit[i] - unit[0]) / ratio for i, ratio in enumerate(self._ratios()[:-1], start=1)]
        return np.array(parts) if parts else np.zeros((0, width))

    def predict(self, width: int) -> Float64:
        """The weights of the kept values in the predicted sample."""
        return self._gain * (math.expm1(self._u) * np.eye(width)[0] + self._b_times(self._predicted(width)))

    def _predicted(self, width: int) -> Float64:
        if self.order == 1:
            return np.zeros(width)
        return self._rhos(self.order - 1) @ self._differences(width)

    def _b_times(self, weights: Float64) -> Float64:
        return self._b * weights if weights.any() else weights  # B(h) may be infinite where nothing needs it

    def correct(self, width: int) -> Float64:
        """What correcting adds, in terms of the next row's [m0, m1, ...]: m0 is the output at the level stepped to."""
        rhos, unit = self._rhos(self.order), np.eye(width)
        before = rhos[:-1] @ self._differences(width) - self._predicted(width)
        later = np.array([0.0, *before[:-1]])  # the next row sees every value one place further back
        return self._gain * self._b * (later + rhos[-1] * (unit[0] - unit[1]))


def _order(r: Request, k: int, n: int) -> int:
    order = int(r.options["solver_order"])
    if r.options["lower_order_final"]:
        order = min(order, n - k)
    elif r.options["final_sigmas_type"] == "zero" and order > 1 and k == n - 1:
        raise UsageError('unipc cannot end at sigma 0 with lower_order_final false; set final_sigmas_type "sigma_min".')
    return min(order, k - r.begin + 1)


def _solver(r: Request) -> str:
    solver = str(r.options["solver_type"])
    solver = "bh2" if solver in ("midpoint", "heun", "logrho") else solver
    if solver not in ("bh1", "bh2"):
        raise UsageError(f"solver_type {solver!r} is unknown; use one of {choices(solver, ('bh1', 'bh2'))}.")
    if int(r.options["solver_order"]) < 1:
        raise UsageError(f"solver_order {r.options['solver_order']!r}: unipc has orders 1 and up.")
    if not r.options["predict_x0"] and r.options["final_sigmas_type"] == "zero":
        raise UsageError('unipc with predict_x0 false cannot end at sigma 0; set final_sigmas_type "sigma_min".')
    if r.sigmas is not None and not r.options["use_flow_sigmas"]:
        raise UsageError("unipc takes sigmas only with use_flow_sigmas true; --sampler euler takes them always.")
    return solver
