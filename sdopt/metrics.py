"""How near one array is to another, in decibels: the measure of every parity in sdopt."""

from __future__ import annotations

import numpy as np

from sdopt.bundle.specs import Array
from sdopt.errors import UsageError


def psnr(reference: Array, other: Array, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 20 log10(peak / RMSE); 200 where they are equal.

    `peak` is the largest |reference| unless given. With NaN or infinity anywhere it is -inf.
    Raises: UsageError for different shapes.
    """
    if reference.shape != other.shape:
        raise UsageError(f"arrays of {list(reference.shape)} and {list(other.shape)} cannot be compared")
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.sqrt(np.mean(np.square(np.subtract(other, reference, dtype=np.float64)))))
    if not np.isfinite(error):
        return -np.inf
    most = float(np.abs(reference).max(initial=0.0)) if peak is None else peak
    return min(200.0, 20 * float(np.log10(max(most, 1e-30) / error))) if error else 200.0
