"""Statistics of timings: median and spread, and ratios with their 95 % intervals.

Timings have long right tails, so every value is a median. Intervals are bootstrap percentiles, with a fixed seed.
Ref: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdopt.bundle.specs import Array
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError

RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """The number of timings, their median and their 10th and 90th percentile, in seconds."""

    n: int
    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval. With a single pair, both ends of the interval are the value itself."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def summary(series: Sequence[float]) -> Summary:
    """Median, 10th and 90th percentile (linear between neighbours)."""
    p10, median, p90 = np.percentile(_checked(series), [10, 50, 90]).tolist()
    return Summary(len(series), median, p10, p90)


def paired_ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Estimate:
    """The median of `above[i] / below[i]`. The two timings of a pair come from the same round.

    Raises: UsageError for series of different length.
    """
    if len(above) != len(below):
        raise UsageError(f"{len(above)} timings beside {len(below)}: pairs are of one run with one number of rounds")
    ratios = _checked(above) / _checked(below)
    return _estimate(float(np.median(ratios)), _medians(ratios, np.random.default_rng(seed)))


def slowdown(old: Sequence[float], new: Sequence[float], seed: int = 0) -> Estimate:
    """median(new) / median(old) of two runs, whose timings are not pairs. 1.1 is a tenth slower."""
    rng = np.random.default_rng(seed)
    before, after = _checked(old), _checked(new)
    return _estimate(float(np.median(after) / np.median(before)), _medians(after, rng) / _medians(before, rng))


def _checked(series: Sequence[float]) -> Array:
    values = np.asarray(series, np.float64)
    are_valid = np.isfinite(values) & (values > 0)
    if not values.size or not are_valid.all():
        raise UsageError(f"timings {list(series)[:5]}: allowed are one or more positive seconds")
    return values


def _medians(values: Array, rng: np.random.Generator) -> Array:
    """The medians of RESAMPLES samples of the same size, drawn with replacement."""
    rows = rng.integers(0, len(values), (RESAMPLES, len(values)))
    return np.asarray(np.median(values[rows], axis=1))


def _estimate(value: float, resampled: Array) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5]).tolist()
    return Estimate(value, low, high)
