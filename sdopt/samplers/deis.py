"""DEIS: the noise extrapolated by a polynomial in log rho and integrated exactly, rho = sigma / alpha.

Ref: Zhang & Chen 2023, arXiv:2204.13902; the polynomial is in log rho as in diffusers, not in rho or t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from sdopt.errors import UsageError
from sdopt.samplers.dpm import levels, multistep_order
from sdopt.samplers.grids import deis_grid
from sdopt.samplers.prediction import clean_of, noise_of
from sdopt.samplers.rows import Request, Rows
from sdopt.samplers.table import SamplerTable


def deis(r: Request) -> SamplerTable:
    """DEIS's table for orders 1 to 3, ending at the smallest trained sigma."""
    if int(r.options["solver_order"]) not in (1, 2, 3):
        raise UsageError(f"solver_order {r.options['solver_order']!r}: deis has orders 1, 2 and 3.")
    grid, rows = deis_grid(r), Rows(r)
    level_at = levels(r, grid)
    rho = [sigma / alpha for alpha, sigma in level_at]
    for k in range(r.begin, len(grid)):
        (alpha, sigma), (alpha2, _) = level_at[k], level_at[k + 1]
        order = multistep_order(r.options, k, len(grid), k - r.begin)
        weights = integrals(rho[k - order + 1 : k + 1][::-1], rho[k], rho[k + 1])
        rows.add(
            grid.timesteps[k],
            level_at[k],
            sigma=grid.sigmas[k],
            keep=noise_of(r.prediction, alpha, sigma),
            update=[alpha2 / alpha, *(alpha2 * w for w in weights)],
            denoised=clean_of(r.prediction, alpha, sigma),
        )
    return rows.table(init_noise_sigma=1.0, end=level_at[-1])


def integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integral over rho from `start` to `end` of each Lagrange polynomial in log rho.

    Raises: UsageError when two nodes are equal.
    """
    logs = [math.log(node) for node in nodes]
    if len(set(logs)) < len(logs):
        raise UsageError("deis: two steps have the same noise level; use fewer steps or another schedule.")
    result = list[float]()
    for i, own in enumerate(logs):
        others = np.array([other for j, other in enumerate(logs) if j != i])
        basis = np.poly1d(others, r=True) / float(np.prod(own - others, initial=1.0))
        result.append(_integral(basis.c[::-1], end) - _integral(basis.c[::-1], start))
    return result


def _integral(coefficients: Iterable[float], rho: float) -> float:
    """The antiderivative of c0 + c1 log(rho) + c2 log(rho)^2 at `rho`."""
    log = math.log(rho)
    parts = (1.0, log - 1, log * log - 2 * log + 2)
    return rho * sum(c * part for c, part in zip(coefficients, parts, strict=False))
