"""Noise schedules: betas -> alpha_bar -> sigmas, spacings of timesteps, and sigma schedules.

Trained numbers (betas, alpha_bar, their sigmas) are float32 and computed as torch computes them, because a checkpoint
was trained and is used with those roundings; everything derived from them is float64.

    alpha_bar   the share of signal variance left at timestep t: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise
    sigma       sqrt(1 - alpha_bar) / sqrt(alpha_bar), the noise level when the signal is scaled to 1

Ref: Ho et al. 2020, arXiv:2006.11239; Karras et al. 2022, arXiv:2206.00364; Lin et al. 2023, arXiv:2305.08891.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdopt.errors import UsageError, choices

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LEAST_ALPHA_BAR = 1e-20  # sigma is 1e10 there, where that of Stable Diffusion is 14.6
NEARLY_ZERO = 2.0**-24  # what stands for alpha_bar = 0 where sigma must stay finite (Euler, DPM-Solver, UniPC)


# ---------------------------------------------------------------------------------------------- trained schedule


def linspace32(start: float, end: float, n: int) -> Float32:
    """torch.linspace in float32: from both ends to the middle, one fused multiply-add each."""
    if n == 1:
        return np.array([start], dtype=np.float32)
    first, last = np.float32(start), np.float32(end)
    step = float(np.divide(np.subtract(last, first), np.float32(n - 1)))
    i = np.arange(n)
    up, down = np.float64(first) + step * i, np.float64(last) - step * (n - 1 - i)
    return np.where(i < n // 2, up, down).astype(np.float32)


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential(t: float) -> float:
    return math.exp(t * -12.0)


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _betas_of(alpha_bar_at: Callable[[float], float], n: int) -> Float32:
    """Betas whose cumulative product follows a function of time in 0..1. Ref: arXiv:2102.09672, equation 17."""
    ratio = [alpha_bar_at((i + 1) / n) / alpha_bar_at(i / n) for i in range(n)]
    return np.array([min(1 - r, 0.999) for r in ratio], dtype=np.float32)


def _sigmoid(start: float, end: float, n: int) -> Float32:
    wave = np.asarray(1 / (1 + np.exp(-linspace32(-6, 6, n))), dtype=np.float32)
    return np.asarray(wave * np.float32(end - start) + np.float32(start), dtype=np.float32)


BETA_SCHEDULES: Mapping[str, Callable[[float, float, int], Float32]] = {
    "linear": linspace32,
    "scaled_linear": lambda start, end, n: linspace32(start**0.5, end**0.5, n) ** 2,
    "squaredcos_cap_v2": lambda start, end, n: _betas_of(_cosine, n),
    "exp": lambda start, end, n: _betas_of(_exponential, n),
    "laplace": lambda start, end, n: _betas_of(_laplace, n),
    "sigmoid": _sigmoid,
}


def betas(options: Mapping[str, Any]) -> Float32:
    """The variance of the noise that training added at each timestep.

    Reads beta_schedule, beta_start, beta_end, num_train_timesteps, trained_betas, rescale_betas_zero_snr.

    Raises: UsageError for a beta_schedule that does not exist.
    """
    trained = options.get("trained_betas")
    if trained is not None:
        values = np.asarray(trained, dtype=np.float32)
    else:
        name = options["beta_schedule"]
        if name not in BETA_SCHEDULES:
            raise UsageError(f"beta_schedule {name!r} is unknown; use one of {choices(str(name), BETA_SCHEDULES)}.")
        n = options["num_train_timesteps"]
        values = _named_betas(name, float(options["beta_start"]), float(options["beta_end"]), int(n))
    return zero_terminal_snr(values) if options.get("rescale_betas_zero_snr") else values


@lru_cache(maxsize=16)
def _named_betas(name: str, start: float, end: float, n: int) -> Float32:
    values = BETA_SCHEDULES[name](start, end, n)
    values.setflags(write=False)
    return values


def _cumulative(values: Float32) -> Float32:
    """torch.cumprod on the CPU: accumulated in float64, each output rounded to float32."""
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def zero_terminal_snr(values: Float32) -> Float32:
    """Betas rescaled so that the last timestep is pure noise. Ref: Lin et al. 2023, arXiv:2305.08891, algorithm 1."""
    root = np.sqrt(_cumulative(1 - values))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alpha_bar_ = root**2
    return 1 - np.concatenate([alpha_bar_[:1], alpha_bar_[1:] / alpha_bar_[:-1]])


def alpha_bar(options: Mapping[str, Any], *, finite_sigma: bool = False) -> Float32:
    """The share of signal variance at every training timestep, as diffusers' alphas_cumprod.

    With `finite_sigma`, a last value that zero terminal SNR made 0 is 2**-24 instead, so that sigma is 4096.

    Shapes: [num_train_timesteps].
    Raises: UsageError for betas that leave nothing of the signal, with which no model can have been trained.
    """
    values = _cumulative(1 - betas(options))
    rescaled = options.get("rescale_betas_zero_snr")
    if not values[-2 if rescaled and len(values) > 1 else -1] > LEAST_ALPHA_BAR:
        named = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        told = ", ".join(f"{name} {options.get(name)}" for name in named)
        raise UsageError(
            f"the scheduler's betas leave {values[-1]:.3g} of the signal's variance at the last timestep; allowed is "
            f"more than {LEAST_ALPHA_BAR:g}. Stable Diffusion has scaled_linear from 0.00085 to 0.012; here is {told}"
        )
    if finite_sigma and options.get("rescale_betas_zero_snr"):
        values[-1] = NEARLY_ZERO
    return values


def sigmas_of(values: Float32) -> Float32:
    """sqrt((1 - alpha_bar) / alpha_bar) in float32: the noise level at every training timestep."""
    return np.sqrt((1 - values) / values)


# ------------------------------------------------------------------------------------------- which timesteps


def spaced(
    n: int, spacing: str, train: int, offset: int = 0, *, fence: bool = False, last: int | None = None
) -> Float64:
    """`n` timesteps from high to low; unrounded where they fall between (the samplers that need integers round them).

    leading    0, r, 2r, ... with r = train // n, plus `offset`; the noisiest timesteps are never visited
    linspace   from train - 1 down to 0
    trailing   train - 1, and then down in equal strides; what few-step models are distilled for
    With `fence` (DPM-Solver, UniPC, DEIS) leading and linspace divide into n + 1 and drop the cleanest.
    `last` (those with lambda_min_clipped) is the number of timesteps that remain after clipping.

    Ref: Lin et al. 2023, arXiv:2305.08891, Table 2.
    Raises: UsageError for an unknown spacing.
    """
    top = train if last is None else last
    if spacing == "linspace":
        grid = np.linspace(0, top - 1, n + fence)
        return (np.round(grid) if fence else grid)[::-1][:n]
    if spacing == "leading":
        return (np.arange(n + fence, dtype=np.float64) * (top // (n + fence)))[::-1][:n] + offset
    if spacing == "trailing":
        return np.round(np.arange(top, 0, -train / n, dtype=np.float64)) - 1
    raise UsageError(f"timestep_spacing {spacing!r} is unknown; use one of {choices(spacing, SPACINGS)}.")


SPACINGS = ("leading", "linspace", "trailing")


def sigma_to_t(sigma: ArrayLike, log_sigmas: Float32) -> Float64:
    """The fractional training timestep whose noise level is `sigma`, interpolating log sigma."""
    log_sigma = np.log(np.maximum(sigma, 1e-10))
    index = np.searchsorted(log_sigmas, log_sigma, side="right") - 1
    low = np.minimum(np.maximum(index, 0), len(log_sigmas) - 2)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    weight = np.minimum(np.maximum((below - log_sigma) / (below - above), 0), 1)
    return (1 - weight) * low + weight * (low + 1)


# ----------------------------------------------------------------------------------------- sigma schedules


def karras(high: float, low: float, n: int, rho: float = 7.0, *, ramp: Float32 | None = None) -> Float64:
    """Sigmas from `high` to `low`, dense where images take shape; `ramp` is for who computes them in float32.

    Ref: Karras et al. 2022, arXiv:2206.00364, equation 5.
    """
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return np.asarray(
        (top + (np.linspace(0, 1, n) if ramp is None else ramp) * (bottom - top)) ** rho, dtype=np.float64
    )


def exponential(high: float, low: float, n: int) -> Float64:
    """Sigmas from `high` to `low` with a constant ratio."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta(high: float, low: float, n: int) -> Float64:
    """Sigmas at the quantiles of a Beta(0.6, 0.6): dense at both ends. Ref: Lee et al. 2024, arXiv:2407.12173."""
    return np.array([low + beta_ppf(p) * (high - low) for p in 1 - np.linspace(0, 1, n)])


def uniform_lambda(log_high: float, log_low: float, n: int) -> Float64:
    """Sigmas with equal strides of the log signal-to-noise ratio. Ref: Lu et al. 2022, arXiv:2206.00927."""
    return np.exp(log_high + np.linspace(0, 1, n) * (log_low - log_high))


def beta_ppf(p: float, a: float = 0.6) -> float:
    """The quantile of a symmetric Beta(a, a) distribution: x with I_x(a, a) = p, to about 1e-15.

    Ref: DLMF 8.17.7 (the series of the incomplete beta function), solved by Newton's method in y = x**a, where it is
    nearly a straight line.
    """
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if p > 0.5:
        return 1 - beta_ppf(1 - p, a)
    scale = a * math.exp(2 * math.lgamma(a) - math.lgamma(2 * a))
    y = min(p * scale, 0.5**a)
    for _ in range(50):
        x = y ** (1 / a)
        step = (_beta_integral(x, a) * a - p * scale) / (1 - x) ** (a - 1)
        y = min(y - step, 0.5**a)
        if abs(step) <= 1e-16 * y:
            break
    return y ** (1 / a)


def _beta_integral(x: float, a: float) -> float:
    """The integral of t**(a-1) (1-t)**(a-1) from 0 to x, for x up to one half, by its power series."""
    term, total, n = 1.0, 1.0 / a, 0
    while abs(term) > 1e-18 and n < 200:
        n += 1
        term *= (n - a) / n * x
        total += term / (a + n)
    return x**a * total


# ----------------------------------------------------------------------------------------------- flow matching


def shifted(sigmas: Float64, shift: float) -> Float64:
    """Flow sigmas moved towards noise for large images. Ref: Esser et al. 2024, arXiv:2403.03206, equation 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(sigmas: Float64, terminal: float) -> Float64:
    """Flow sigmas stretched so that the last one is `terminal`.

    Raises: UsageError when the first is also the last, at pure noise.
    """
    if sigmas[-1] == 1:
        raise UsageError("shift_terminal needs two steps or more.")
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))
