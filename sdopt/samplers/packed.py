"""A table as one array: the rows that a fused step takes, one vector per call of the denoiser.

    column       0         1         2     3       4      5        6        7        8         9 ...             -1
    row      timestep  guidance  rescale  c_in  c_skip  c_out  clean_x  clean_o  update_x  update_m_k, m_k-1 ...  noise

The width is the same for every sampler, and columns that a sampler does not use are 0, so that one graph serves all.
`sdopt.build.fuse_step` says what the graph does with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdopt.bundle.specs import Float32
from sdopt.errors import UsageError
from sdopt.samplers.table import SamplerTable

SCALARS = ("timestep", "guidance", "rescale", "c_in", "c_skip", "c_out", "clean_x", "clean_o")
HISTORY = 12  # values kept from earlier calls: as many as the deepest sampler uses, PNDM after its Runge-Kutta warm-up


def row_width(history: int = HISTORY) -> int:
    """How many numbers a row has: the scalars, then weights of the sample, the newest and older values, the noise."""
    return len(SCALARS) + history + 3


def packed(table: SamplerTable, guidance: Sequence[float], rescale: float = 0.0, *, history: int = HISTORY) -> Float32:
    """The rows of `table` for a graph that keeps `history` earlier values; `guidance` has one scale per call.

    Calls whose scale is 1 or less rescale nothing: there is only the conditional output.

    Shapes: [calls, row_width(history)].
    Raises: UsageError if the table looks further back than the graph does, or the scales are not one per call.
    """
    if len(guidance) != len(table):
        raise UsageError(f"{len(guidance)} guidance scales for {len(table)} calls of {table.name}; give one for each")
    depth = int(np.flatnonzero(table.update[:, :-1].any(0))[-1]) if table.update[:, :-1].any() else 0
    if depth > history + 1:
        raise UsageError(
            f"{table.name} looks back {depth - 1} calls, this graph keeps {history}; fuse it again with more history"
        )
    rows = np.zeros((len(table), row_width(history)), np.float32)
    rows[:, 0], rows[:, 1] = table.timestep, guidance
    rows[:, 2] = np.where(np.asarray(guidance) > 1, rescale, 0)
    rows[:, 3], rows[:, 4], rows[:, 5] = table.c_in, table.c_skip, table.c_out
    rows[:, 6:8] = table.denoised
    width = min(table.order + 1, history + 2)
    rows[:, len(SCALARS) : len(SCALARS) + width] = table.update[:, :width]
    rows[:, -1] = table.update[:, -1]
    return rows
