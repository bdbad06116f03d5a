"""How near one array is to another: in decibels, the measure of every parity in sdopt, and pictures also in SSIM."""

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


WINDOW = 11  # pixels a side of SSIM's Gaussian window
DEVIATION = 1.5  # of it, in pixels


def ssim(reference: Array, other: Array, peak: float = 1.0) -> float:
    """Structural similarity of pictures [..., height, width, channels], the mean over windows, channels and pictures.

    1 where they are equal. Windows lie inside the pictures. `peak` is the range of the values.
    Ref: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equation 13, with
    its 11x11 Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03.
    Raises: UsageError for different shapes, and for pictures smaller than the window.
    """
    if reference.shape != other.shape:
        raise UsageError(f"arrays of {list(reference.shape)} and {list(other.shape)} cannot be compared")
    if reference.ndim < 3 or min(reference.shape[-3:-1]) < WINDOW:
        raise UsageError(f"SSIM compares pictures of {WINDOW}x{WINDOW} pixels or more, not {list(reference.shape)}")
    x, y = reference.astype(np.float64), other.astype(np.float64)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    cov = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * (2 * cov + c2) / (var_x + var_y + c2)))


def _windowed(array: Array) -> Array:
    """The weighted mean of each window of [..., height, width, channels] that lies inside."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * DEVIATION**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        length = array.shape[axis] - WINDOW + 1
        parts = (w * np.take(array, range(k, k + length), axis) for k, w in enumerate(weights))
        array = np.sum(list(parts), axis=0)
    return array
