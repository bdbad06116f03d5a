"""Which timesteps and noise levels a sampler visits: the three families of diffusers' schedulers.

integer_grid   DDIM, DDPM, PNDM          timesteps are indices into alpha_bar
sigma_grid     Euler, LMS, Heun, KDPM2   timesteps may be fractional; sigmas end in 0
solver_grid    DPM-Solver, UniPC, DEIS   n + 1 fence posts, the last one dropped; timesteps truncated to integers
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.samplers import schedules
from sdopt.samplers.rows import Request

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Noise levels and the timesteps that name them to the denoiser.

    Shapes: timesteps [n], sigmas [n + 1]: step i goes from sigmas[i] to sigmas[i + 1].
    """

    timesteps: Float64
    sigmas: Float64

    def __len__(self) -> int:
        return len(self.timesteps)


def integer_grid(request: Request) -> NDArray[np.int64]:
    """Integer timesteps from high to low, before image to image skips the first ones."""
    if request.timesteps is not None:
        return np.array(custom_timesteps(request, integers=True), dtype=np.int64)
    o = request.options
    spaced = schedules.spaced(request.steps, o["timestep_spacing"], request.train, o["steps_offset"])
    return np.round(spaced).astype(np.int64)


def custom_timesteps(request: Request, *, integers: bool) -> Sequence[float]:
    """The timesteps that the caller gave, checked.

    Raises: UsageError unless they fall strictly and lie in 0..num_train_timesteps - 1.
    """
    given = list(request.timesteps or ())
    falling = all(a > b for a, b in pairwise(given))
    inside = all(0 <= t <= request.train - 1 for t in given)
    all_integers = all(float(t).is_integer() for t in given)
    if not given or not falling or not inside or (integers and not all_integers):
        kind = "whole numbers" if integers else "numbers"
        raise UsageError(
            f"timesteps={given}: {request.name} takes {kind} from {request.train - 1} down to 0, each lower than the "
            f"one before, for example timesteps={[request.train - 1, request.train // 2 - 1]}."
        )
    return given


def custom_sigmas(request: Request, *, highest: float = math.inf) -> Float64:
    """The sigmas that the caller gave, checked.

    Raises: UsageError unless they fall strictly, and lie between 0 and `highest`.
    """
    given = np.array(request.sigmas, dtype=np.float32).astype(np.float64)
    listed = given.ndim == 1 and len(given) > 0
    falling = listed and not (np.diff(given) >= 0).any()
    if not falling or given.min() < 0 or given[0] > highest:
        limit = f"at most {highest:g}, " if math.isfinite(highest) else ""
        raise UsageError(
            f"sigmas={given.tolist()}: {request.name} takes noise levels, {limit}each lower than the one before "
            "and none below 0, for example sigmas=[14.6, 4.1, 1.6, 0.7, 0.0]."
        )
    return given


# ------------------------------------------------------------------------------------------------ Euler's family


def sigma_grid(request: Request, *, finite_sigma: bool = True) -> Grid:
    """Fractional timesteps and their sigmas, down to sigma 0 (or the smallest trained one: final_sigmas_type)."""
    o = request.options
    alpha_bar = schedules.alpha_bar(o, finite_sigma=finite_sigma)
    trained = schedules.sigmas_of(alpha_bar)
    grid = _spaced_sigmas(request, trained) if request.sigmas is None else _given_sigmas(request, trained)
    if o.get("timestep_type") == "continuous" and request.prediction == "v_prediction":
        return Grid(0.25 * np.log(grid.sigmas[: len(grid)]), grid.sigmas)
    return grid


def _given_sigmas(request: Request, trained: Float32) -> Grid:
    sigmas = custom_sigmas(request)
    steps = schedules.sigma_to_t(sigmas[:-1].astype(np.float32), np.log(trained))
    return Grid(_as_float32(steps), sigmas)


def _spaced_sigmas(request: Request, trained: Float32) -> Grid:
    o = request.options
    if request.timesteps is not None:
        timesteps = np.array(custom_timesteps(request, integers=False))
    else:
        timesteps = schedules.spaced(request.steps, o["timestep_spacing"], request.train, o["steps_offset"])
    timesteps = _as_float32(timesteps)
    log_sigmas = np.log(trained)
    sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    if o.get("interpolation_type") == "log_linear":
        ramp = schedules.linspace32(float(log_sigmas[-1]), float(log_sigmas[0]), request.steps + 1)
        sigmas = np.exp(ramp).astype(np.float64)
    schedule = schedule_of(o)
    if schedule:
        sigmas = scheduled(o, schedule, sigmas[0], sigmas[-1], request.steps)
        timesteps = _as_float32(schedules.sigma_to_t(sigmas, log_sigmas))
    return Grid(timesteps, _as_float32(np.append(sigmas, _final(o, trained[0]))))


# ------------------------------------------------------------------------------------------------ the ODE solvers


def solver_grid(request: Request, *, spacing: str | None = None, round_cosine: bool = True) -> Grid:
    """Integer timesteps and their sigmas for DPM-Solver; `spacing` is for singlestep, which knows only linspace."""
    o = request.options
    alpha_bar = schedules.alpha_bar(o, finite_sigma=True)
    trained = schedules.sigmas_of(alpha_bar)
    if request.timesteps is not None:
        timesteps = np.array(custom_timesteps(request, integers=True), dtype=np.float64)
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    elif schedule_of(o):
        timesteps, sigmas = _solver_schedule(request, trained, round_cosine)
    elif o["use_flow_sigmas"]:
        timesteps, sigmas = _flow_sigmas(request)
    else:
        last = _unclipped(alpha_bar, o["lambda_min_clipped"])
        timesteps = _fence(request, spacing or o["timestep_spacing"], last)
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    return _truncated(request, timesteps, np.append(sigmas, _final(o, trained[0])))


def unipc_grid(request: Request) -> Grid:
    """As `solver_grid`, but final_sigmas_type "sigma_min" repeats the last sigma of a sigma schedule."""
    o = request.options
    trained = schedules.sigmas_of(schedules.alpha_bar(o, finite_sigma=True))
    if o["use_flow_sigmas"] and schedule_of(o) in ("", "karras"):
        timesteps, sigmas = _unipc_flow(request, trained)
        return _truncated(request, timesteps, np.append(sigmas, _final(o, sigmas[-1])))
    timesteps, sigmas = _plain_or_scheduled(request, trained)
    smallest = sigmas[-1] if schedule_of(o) else trained[0]
    return _truncated(request, timesteps, np.append(sigmas, _final(o, smallest)))


def deis_grid(request: Request) -> Grid:
    """As `unipc_grid`, but always ending above 0, where DEIS is defined."""
    o = request.options
    trained = schedules.sigmas_of(schedules.alpha_bar(o))
    flow = o["use_flow_sigmas"] and not schedule_of(o)
    timesteps, sigmas = _flow_sigmas(request) if flow else _plain_or_scheduled(request, trained)
    last = sigmas[-1] if flow or schedule_of(o) else trained[0]
    return _truncated(request, timesteps, np.append(sigmas, last))


def _truncated(request: Request, timesteps: Float64, sigmas: Float64) -> Grid:
    """The grid with its timesteps truncated to integers.

    Raises: UsageError when image to image skips all of them; lambda_min_clipped can leave few.
    """
    if request.begin >= len(timesteps):
        raise UsageError(f"{request.name}: no step is left to do; use more steps or a higher strength.")
    return Grid(np.trunc(timesteps), _as_float32(sigmas))


def _plain_or_scheduled(request: Request, trained: Float32) -> tuple[Float64, Float64]:
    if schedule_of(request.options):
        return _solver_schedule(request, trained, round_cosine=True)
    timesteps = _fence(request, request.options["timestep_spacing"], request.train)
    return timesteps, np.interp(timesteps, np.arange(len(trained)), trained)


def _solver_schedule(request: Request, trained: Float32, round_cosine: bool) -> tuple[Float64, Float64]:
    """A sigma schedule over the whole trained range; Karras and Lu round their timesteps, the others truncate."""
    o, schedule = request.options, schedule_of(request.options)
    sigmas = scheduled(o, schedule, float(trained[-1]), float(trained[0]), request.steps)
    timesteps = schedules.sigma_to_t(sigmas, np.log(trained))
    cosine = o["beta_schedule"] == "squaredcos_cap_v2"
    if schedule in ("karras", "lu") and (round_cosine or not cosine):
        timesteps = np.round(timesteps)
    return timesteps, sigmas


def _fence(request: Request, spacing: str, last: int) -> Float64:
    if spacing != "trailing" and request.steps >= last:
        raise UsageError(
            f"{request.name} with timestep_spacing {spacing!r} takes at most {last - 1} steps of {last} timesteps, "
            f"got {request.steps}."
        )
    offset = request.options.get("steps_offset", 0)
    return schedules.spaced(request.steps, spacing, request.train, offset, fence=True, last=last)


def _unclipped(alpha_bar: Float32, lambda_min: float | str | None) -> int:
    """How many timesteps have a log signal-to-noise ratio lambda of at least `lambda_min`."""
    if lambda_min is None or float(lambda_min) == -math.inf:
        return len(alpha_bar)
    lambdas = np.log(np.sqrt(alpha_bar)) - np.log(np.sqrt(1 - alpha_bar))
    return len(alpha_bar) - int(np.searchsorted(lambdas[::-1], np.float32(lambda_min)))


def _flow_sigmas(request: Request) -> tuple[Float64, Float64]:
    sigmas = 1 - np.linspace(1, 1 / request.train, request.steps + 1)
    sigmas = schedules.shifted(sigmas, _flow_shift(request))[::-1][:-1]
    return sigmas * request.train, sigmas


def _unipc_flow(request: Request, trained: Float32) -> tuple[Float64, Float64]:
    """UniPC's flow sigmas: with Karras, sigma / (1 + sigma) of the trained ones; else shifted ones starting below 1."""
    if schedule_of(request.options) == "karras":
        sigmas = scheduled(request.options, "karras", float(trained[-1]), float(trained[0]), request.steps)
        sigmas = sigmas / (sigmas + 1)
        return sigmas * request.train, sigmas
    sigmas = np.linspace(1, 1 / request.train, request.steps + 1)[:-1]
    if request.sigmas is not None:
        sigmas = custom_sigmas(request, highest=1.0)
    sigmas = schedules.shifted(sigmas, _flow_shift(request))
    terminal = request.options.get("shift_terminal")
    if terminal:
        sigmas = schedules.stretched(sigmas, terminal)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6
    return sigmas * request.train, sigmas


def _flow_shift(request: Request) -> float:
    """The shift of flow sigmas; `mu`, where the caller knows it from the size of the image, is its logarithm."""
    return float(request.options["flow_shift"]) if request.mu is None else math.exp(request.mu)


def _final(options: Mapping[str, Any], smallest: float) -> float:
    kind = options.get("final_sigmas_type", "zero")
    if kind not in ("zero", "sigma_min"):
        raise UsageError(f"final_sigmas_type {kind!r} is unknown; use one of zero, sigma_min.")
    return 0.0 if kind == "zero" else float(smallest)


# --------------------------------------------------------------------------------------------- sigma schedules

SCHEDULE_FLAGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}


def schedule_of(options: Mapping[str, Any]) -> str:
    """The sigma schedule that the options ask for, or "".

    Raises: UsageError when they ask for two.
    """
    names = [name for name, flag in SCHEDULE_FLAGS.items() if options.get(flag)]
    if len(names) > 1:
        flags = " and ".join(SCHEDULE_FLAGS[name] for name in names)
        raise UsageError(f"only one sigma schedule at a time, and {flags} are true; name one with --schedule.")
    return names[0] if names else ""


def scheduled(options: Mapping[str, Any], schedule: str, high: float, low: float, n: int) -> Float64:
    """`n` sigmas between `high` and `low`, unless the options name sigma_max or sigma_min."""
    if schedule == "lu":
        return schedules.uniform_lambda(float(np.log(np.float32(high))), float(np.log(np.float32(low))), n)
    named_high, named_low = options.get("sigma_max"), options.get("sigma_min")
    high = float(high if named_high is None else named_high)
    low = float(low if named_low is None else named_low)
    make = {"karras": schedules.karras, "exponential": schedules.exponential, "beta": schedules.beta}[schedule]
    return make(high, low, n)


def _as_float32(values: Float64) -> Float64:
    return values.astype(np.float32).astype(np.float64)
