"""Likeness is measured in decibels of the peak, and only between arrays that can be compared."""

from __future__ import annotations

import numpy as np
import pytest

from sdopt.errors import UsageError
from sdopt.metrics import psnr

HALF = np.full((4, 4), 0.5, np.float32)


def test_likeness_is_in_decibels_of_the_peak() -> None:
    assert psnr(HALF, HALF + np.float32(0.1), peak=1.0) == pytest.approx(20, abs=1e-3)
    assert psnr(HALF, HALF + np.float32(0.1)) == pytest.approx(20 - 6.02, abs=1e-2)
    assert psnr(HALF, HALF) == 200


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_is_like_nothing(number: float) -> None:
    assert psnr(HALF, HALF * np.float32(number)) == -np.inf
    assert psnr(HALF * np.float32(number), HALF) == -np.inf


def test_arrays_of_different_shapes_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match=r"arrays of \[4, 4\] and \[2, 4\] cannot be compared"):
        psnr(HALF, HALF[:2])
