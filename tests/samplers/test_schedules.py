"""Schedules: the trained numbers are torch's to the bit (roots excepted), and sigma schedules are diffusers'."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sdopt.errors import UsageError
from sdopt.samplers import schedules
from sdopt.samplers.options import DDPM

SD = {**DDPM, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("start", "end", "n"),
    [(0.02915, 0.10954, 1000), (1e-4, 0.02, 1000), (1e-4, 0.02, 501), (1, 0, 21), (0, 1, 7), (-6, 6, 9)],
)
def test_linspace_is_torchs_to_the_bit(start: float, end: float, n: int) -> None:
    torch = pytest.importorskip("torch")
    assert (schedules.linspace32(start, end, n) == torch.linspace(start, end, n).numpy()).all()


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"])
@pytest.mark.parametrize("zero", [False, True])
def test_alpha_bar_is_diffusers(name: str, zero: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    options = {**SD, "beta_schedule": name, "rescale_betas_zero_snr": zero}
    theirs = diffusers.DDPMScheduler(**options).alphas_cumprod.numpy()
    ours = schedules.alpha_bar(options)
    assert ours.dtype == np.float32
    exact = name in ("linear", "scaled_linear", "squaredcos_cap_v2") and not zero
    assert np.abs(ours - theirs).max() <= (0.0 if exact else 1.5e-6)


def test_the_numbers_everybody_knows() -> None:
    alpha_bar = schedules.alpha_bar(SD)
    assert alpha_bar[[0, 999]] == pytest.approx([0.99915, 0.004660095], rel=1e-6)
    assert schedules.sigmas_of(alpha_bar)[[0, 999]] == pytest.approx([0.02916753, 14.614647], rel=1e-6)


def test_zero_terminal_snr_ends_at_no_signal_or_at_a_finite_sigma() -> None:
    options = {**SD, "rescale_betas_zero_snr": True}
    assert schedules.alpha_bar(options)[-1] == 0
    assert schedules.sigmas_of(schedules.alpha_bar(options, finite_sigma=True))[-1] == pytest.approx(4096, rel=1e-3)


def test_trained_betas_are_taken_as_they_are() -> None:
    assert schedules.betas({**SD, "trained_betas": [0.1, 0.2]}) == pytest.approx([0.1, 0.2])


def test_an_unknown_beta_schedule_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match="use one of scaled_linear"):
        schedules.betas({**SD, "beta_schedule": "scaled_liner"})


@pytest.mark.parametrize(
    ("spacing", "fence", "expected"),
    [
        ("leading", False, [751, 501, 251, 1]),
        ("linspace", False, [999, 666, 333, 0]),
        ("trailing", False, [999, 749, 499, 249]),
        ("leading", True, [801, 601, 401, 201]),
        ("linspace", True, [999, 749, 500, 250]),
        ("trailing", True, [999, 749, 499, 249]),
    ],
)
def test_spacings_for_four_steps(spacing: str, fence: bool, expected: list[int]) -> None:
    assert schedules.spaced(4, spacing, 1000, offset=1, fence=fence) == pytest.approx(expected, abs=1e-9)


def test_an_unknown_spacing_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match="leading, linspace, trailing|trailing"):
        schedules.spaced(4, "trailling", 1000)


def test_beta_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    tails = 10.0 ** -np.arange(1, 15)
    p = np.concatenate([np.linspace(0, 1, 301), tails, 1 - tails, [0.5, 0.4999]])
    for a in (0.6, 0.5, 1.0, 2.5):
        ours = np.array([schedules.beta_ppf(float(v), a) for v in p])
        assert np.abs(ours - stats.beta.ppf(p, a, a)).max() < 1e-13


@pytest.mark.parametrize("make", [schedules.karras, schedules.exponential, schedules.beta])
@pytest.mark.parametrize("n", [2, 3, 7, 50])
def test_sigma_schedules_fall_from_high_to_low(make: Any, n: int) -> None:
    sigmas = make(14.6, 0.03, n)
    assert sigmas[[0, -1]] == pytest.approx([14.6, 0.03])
    assert (np.diff(sigmas) < 0).all()


def test_karras_is_equation_5() -> None:
    expected = [(14.6 ** (1 / 7) + i / 4 * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7 for i in range(5)]
    assert schedules.karras(14.6, 0.03, 5) == pytest.approx(expected)


def test_sigma_to_t_inverts_the_trained_sigmas() -> None:
    sigmas = schedules.sigmas_of(schedules.alpha_bar(SD))
    t = schedules.sigma_to_t(sigmas.astype(np.float64), np.log(sigmas))
    assert np.abs(t - np.arange(1000)).max() < 1e-3
    assert schedules.sigma_to_t(np.array([1e-9, 1e9]), np.log(sigmas)) == pytest.approx([0, 999])


def test_uniform_lambda_has_equal_strides_of_log_sigma() -> None:
    steps = np.diff(np.log(schedules.uniform_lambda(math.log(14.6), math.log(0.03), 9)))
    assert steps == pytest.approx(np.full(8, steps[0]))


def test_flow_shift_keeps_both_ends() -> None:
    assert schedules.shifted(np.array([1.0, 0.5, 0.0]), 3.0) == pytest.approx([1, 0.75, 0])
    assert schedules.stretched(np.array([1.0, 0.5, 0.2]), 0.1)[-1] == pytest.approx(0.1)
    with pytest.raises(UsageError, match="two steps"):
        schedules.stretched(np.array([1.0]), 0.1)
