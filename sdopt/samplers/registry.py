"""The samplers by name, and how names, configs and options become a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdopt.errors import UsageError, choices
from sdopt.samplers import options as defaults_of
from sdopt.samplers.consistency import lcm, tcd
from sdopt.samplers.ddim import ddim, ddpm
from sdopt.samplers.deis import deis
from sdopt.samplers.dpm import dpm_multistep, dpm_singlestep
from sdopt.samplers.edm import edm_dpm, edm_euler
from sdopt.samplers.euler import euler, euler_a, lms
from sdopt.samplers.flow import flow_euler
from sdopt.samplers.grids import SCHEDULE_FLAGS
from sdopt.samplers.heun import dpm2, dpm2_a, heun
from sdopt.samplers.options import Options, merged
from sdopt.samplers.pndm import ipndm, pndm
from sdopt.samplers.rows import Request
from sdopt.samplers.table import SamplerTable
from sdopt.samplers.unipc import unipc


@dataclass(frozen=True)
class Sampler:
    """One entry of SAMPLERS: the function that writes its rows, and what people should know about it."""

    name: str
    title: str  # what AUTOMATIC1111 and papers call it
    function: Callable[[Request], SamplerTable]
    diffusers: str  # the class whose scheduler_config.json it reads
    defaults: Options  # of that class
    order: int  # of convergence, for the most that its options allow here
    paper: str
    forced: Mapping[str, Any] = field(default_factory=dict[str, Any])  # options that the name itself implies
    stochastic: bool = False
    calls: Callable[[int], int] = lambda n: n  # calls of the denoiser for n steps
    aliases: tuple[str, ...] = ()
    custom: tuple[str, ...] = ()  # "timesteps", "sigmas": which the caller may give
    steps_per_call: int = 1  # diffusers' scheduler.order: rows that one step of image to image skips


_DPM, _DPM_SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_PLUS: Mapping[str, Any] = {"algorithm_type": "dpmsolver++"}
_SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++"}


def _twice(n: int) -> int:
    return 2 * n - 1


_ALL = (
    Sampler("ddim", "DDIM", ddim, "DDIMScheduler", defaults_of.DDIM, 1, "arXiv:2010.02502",
            aliases=("DDIMParallelScheduler",)),
    Sampler("ddpm", "DDPM", ddpm, "DDPMScheduler", defaults_of.DDPM, 1, "arXiv:2006.11239", stochastic=True,
            custom=("timesteps",), aliases=("DDPMParallelScheduler",)),
    Sampler("pndm", "PLMS", pndm, "PNDMScheduler", defaults_of.PNDM, 4, "arXiv:2202.09778",
            calls=lambda n: n + 1 if n > 1 else n),
    Sampler("lms", "LMS", lms, "LMSDiscreteScheduler", defaults_of.LMS, 4, "arXiv:2206.00364"),
    Sampler("euler", "Euler", euler, "EulerDiscreteScheduler", defaults_of.EULER, 1, "arXiv:2206.00364",
            custom=("timesteps", "sigmas")),
    Sampler("euler_a", "Euler a", euler_a, "EulerAncestralDiscreteScheduler", defaults_of.EULER_ANCESTRAL, 1,
            "arXiv:2206.00364", stochastic=True, aliases=("euler ancestral",)),
    Sampler("heun", "Heun", heun, "HeunDiscreteScheduler", defaults_of.HEUN, 2, "arXiv:2206.00364", calls=_twice,
            custom=("timesteps",), steps_per_call=2),
    Sampler("dpm2", "DPM2", dpm2, "KDPM2DiscreteScheduler", defaults_of.KDPM2, 2, "arXiv:2206.00927", calls=_twice,
            steps_per_call=2, aliases=("kdpm2",)),
    Sampler("dpm2_a", "DPM2 a", dpm2_a, "KDPM2AncestralDiscreteScheduler", defaults_of.KDPM2, 2, "arXiv:2206.00927",
            stochastic=True, calls=_twice, steps_per_call=2, aliases=("kdpm2_a", "dpm2 ancestral")),
    Sampler("dpmpp_2m", "DPM++ 2M", dpm_multistep, _DPM, defaults_of.DPM, 2, "arXiv:2211.01095",
            {**_PLUS, "solver_order": 2}, custom=("timesteps",)),
    Sampler("dpmpp_3m", "DPM++ 3M", dpm_multistep, _DPM, defaults_of.DPM, 3, "arXiv:2211.01095",
            {**_PLUS, "solver_order": 3}, custom=("timesteps",)),
    Sampler("dpmpp_2m_sde", "DPM++ 2M SDE", dpm_multistep, _DPM, defaults_of.DPM, 2, "arXiv:2211.01095",
            {**_SDE, "solver_order": 2}, stochastic=True, custom=("timesteps",)),
    Sampler("dpmpp_3m_sde", "DPM++ 3M SDE", dpm_multistep, _DPM, defaults_of.DPM, 1, "arXiv:2211.01095",
            {**_SDE, "solver_order": 3}, stochastic=True, custom=("timesteps",)),
    Sampler("dpmpp_2s", "DPM++ 2S", dpm_singlestep, _DPM_SINGLE, defaults_of.DPM_SINGLE, 2, "arXiv:2211.01095",
            {**_PLUS, "solver_order": 2}, custom=("timesteps",), aliases=("DPM++ SDE",)),
    Sampler("dpmpp_3s", "DPM++ 3S", dpm_singlestep, _DPM_SINGLE, defaults_of.DPM_SINGLE, 3, "arXiv:2211.01095",
            {**_PLUS, "solver_order": 3}, custom=("timesteps",)),
    Sampler("unipc", "UniPC", unipc, "UniPCMultistepScheduler", defaults_of.UNIPC, 3, "arXiv:2302.04867",
            custom=("sigmas",)),
    Sampler("deis", "DEIS", deis, "DEISMultistepScheduler", defaults_of.DEIS, 2, "arXiv:2204.13902"),
    Sampler("ipndm", "iPNDM", ipndm, "IPNDMScheduler", defaults_of.IPNDM, 4, "arXiv:2204.13902"),
    Sampler("lcm", "LCM", lcm, "LCMScheduler", defaults_of.LCM, 1, "arXiv:2310.04378", stochastic=True,
            custom=("timesteps",)),
    Sampler("tcd", "TCD", tcd, "TCDScheduler", defaults_of.LCM, 1, "arXiv:2402.19159", stochastic=True,
            custom=("timesteps",)),
    Sampler("edm_euler", "EDM Euler", edm_euler, "EDMEulerScheduler", defaults_of.EDM, 1, "arXiv:2206.00364"),
    Sampler("edm_dpmpp_2m", "EDM DPM++ 2M", edm_dpm, "EDMDPMSolverMultistepScheduler", defaults_of.EDM_DPM, 2,
            "arXiv:2211.01095", {**_PLUS, "solver_order": 2}),
    Sampler("flow_euler", "Flow Euler", flow_euler, "FlowMatchEulerDiscreteScheduler", defaults_of.FLOW_EULER, 1,
            "arXiv:2210.02747", custom=("timesteps", "sigmas")),
)  # fmt: skip

SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _ALL}
SCHEDULES = (*SCHEDULE_FLAGS, "normal", "sgm_uniform", "simple", "leading", "linspace", "trailing")


def sampler_table(
    config: Mapping[str, Any],
    steps: int,
    *,
    sampler: str | None = None,
    schedule: str | None = None,
    strength: float = 1.0,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    mu: float | None = None,
) -> SamplerTable:
    """The table of a checkpoint's sampler, from its scheduler_config.json, for a number of steps.

    `sampler` and `schedule` replace the checkpoint's (see `find_sampler` and SCHEDULES); `strength` below 1 begins where
    image to image does; `timesteps` or `sigmas` replace the spacing, and then decide the number of steps; `eta` is the
    noise of DDIM and TCD; `mu` is the logarithm of the flow shift that the size of the image asks for.

    Raises: UsageError for unknown names, options that no table can express, and numbers that make no schedule.
    """
    entry, options, notes = resolve(config, sampler, schedule)
    steps = _count(entry, options, steps, timesteps, sigmas)
    begin = _skipped(steps, strength) * entry.steps_per_call
    request = Request(entry.name, options, steps, begin, timesteps, sigmas, eta, mu, notes)
    return entry.function(request)


def resolve(
    config: Mapping[str, Any], sampler: str | None = None, schedule: str | None = None
) -> tuple[Sampler, Options, tuple[str, ...]]:
    """The sampler, all of its options, and notes, from a scheduler_config.json and what the user prefers."""
    name = sampler if sampler is not None else config.get("_class_name")
    if not name:
        raise UsageError('the scheduler config has no "_class_name"; name a sampler: ' + ", ".join(SAMPLERS) + ".")
    entry, implied = find_sampler(str(name))
    options, notes = merged(entry.defaults, config)
    by_class = str(name) == entry.diffusers
    options |= {} if by_class else entry.forced
    wanted = schedule if schedule is not None else implied
    if wanted is not None:
        options |= _schedule_options(entry, wanted)
    return (_named_by_options(entry, options) if by_class else entry), options, notes


def find_sampler(name: str) -> tuple[Sampler, str | None]:
    """(sampler, schedule) for sdopt's name, diffusers' class name, or AUTOMATIC1111's: "DPM++ 2M Karras".

    Raises: UsageError listing all names, the nearest first.
    """
    key, schedule = _normal(name), None
    if key not in _NAMES:
        for suffix in sorted(SCHEDULES, key=len, reverse=True):
            stem = key.removesuffix(_normal(suffix))
            if stem != key and stem in _NAMES:
                key, schedule = stem, suffix
                break
    if key not in _NAMES:
        raise UsageError(f"sampler {name!r} is unknown; use one of {choices(name, SAMPLERS)}.")
    return SAMPLERS[_NAMES[key]], schedule


def _normal(name: str) -> str:
    """Names compared without case, spaces, underscores and dashes; + counts."""
    return "".join(c for c in name.lower().replace("++", "pp") if c.isalnum())


_NAMES: dict[str, str] = {}
for _entry in reversed(_ALL):  # the first of those that share a class is the one that the class name means
    for _name in (_entry.name, _entry.title, _entry.diffusers, *_entry.aliases):
        _NAMES[_normal(_name)] = _entry.name
        _NAMES[_normal(_name).removesuffix("scheduler")] = _entry.name


def _named_by_options(entry: Sampler, options: Options) -> Sampler:
    """Among samplers of one class, the one whose name implies these options; else the class's first."""
    for other in _ALL:
        if other.diffusers == entry.diffusers and other.forced.items() <= options.items():
            return other
    return entry


def _schedule_options(entry: Sampler, schedule: str) -> Options:
    """The options that a schedule name stands for.

    Raises: UsageError when there is no such schedule, or not for this sampler.
    """
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule {schedule!r} is unknown; use one of {choices(schedule, SCHEDULES)}.")
    plain: Options = {flag: False for flag in SCHEDULE_FLAGS.values() if flag in entry.defaults}
    if "sigma_schedule" in entry.defaults and schedule in ("karras", "exponential"):
        return {"sigma_schedule": schedule}
    if schedule in SCHEDULE_FLAGS:
        flag = SCHEDULE_FLAGS[schedule]
        if flag not in entry.defaults:
            able = [s.name for s in _ALL if flag in s.defaults]
            raise UsageError(f"{entry.name} has no schedule {schedule!r}; samplers that have: {', '.join(able)}.")
        return {**plain, flag: True}
    if schedule == "normal":
        return plain
    if "timestep_spacing" not in entry.defaults:
        raise UsageError(f"{entry.name} has one spacing of its own; schedule {schedule!r} does not apply to it.")
    return {**plain, "timestep_spacing": "trailing" if schedule in ("sgm_uniform", "simple") else schedule}


def _count(
    entry: Sampler, options: Options, steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> int:
    """The number of steps, once it is known to make sense."""
    if timesteps is not None and sigmas is not None:
        raise UsageError("give timesteps or sigmas, not both.")
    for kind, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        if given is None:
            continue
        if kind not in entry.custom:
            able = [s.name for s in _ALL if kind in s.custom]
            raise UsageError(f"{entry.name} does not take {kind}; samplers that do: {', '.join(able)}.")
        asked = [flag for flag in SCHEDULE_FLAGS.values() if options.get(flag)]
        if asked and kind == "timesteps":
            raise UsageError(f"timesteps cannot be combined with {asked[0]}; use --schedule normal.")
        return len(given) - (kind == "sigmas" and entry.name == "euler")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"steps {steps!r}: the number of steps is a whole number, 1 or more.")
    if steps > options["num_train_timesteps"]:
        raise UsageError(f"steps {steps}: the model was trained on {options['num_train_timesteps']} timesteps, use fewer.")
    return steps


def _skipped(steps: int, strength: float) -> int:
    """How many steps image to image skips: strength 0.6 of 50 does the last 30.

    Raises: UsageError when strength is outside 0..1 or leaves nothing to do.
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"strength {strength!r} is out of range; 0 keeps the image, 1 replaces it.")
    done = min(int(steps * strength), steps)
    if done < 1:
        raise UsageError(f"strength {strength} of {steps} steps leaves no step to do; use a strength of {1 / steps:g} or more.")
    return steps - done
