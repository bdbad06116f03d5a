"""The samplers by name: sdopt's, diffusers' class names, and those of AUTOMATIC1111."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices
from sdopt.samplers import options as defaults_of
from sdopt.samplers.consistency import lcm, tcd
from sdopt.samplers.ddim import ddim, ddpm
from sdopt.samplers.deis import deis
from sdopt.samplers.dpm import dpm_multistep
from sdopt.samplers.dpm_single import dpm_singlestep
from sdopt.samplers.edm import edm_dpm, edm_euler
from sdopt.samplers.euler import euler, euler_a, lms
from sdopt.samplers.flow import flow_euler, flow_heun
from sdopt.samplers.grids import SCHEDULE_FLAGS
from sdopt.samplers.heun import dpm2, dpm2_a, heun
from sdopt.samplers.options import Options
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
    order: int  # of its solver; the first steps have less history, and less order
    paper: str
    forced: Mapping[str, Any] = field(default_factory=dict[str, Any])  # options that the name itself implies
    stochastic: bool = False
    calls: Callable[[int], int] = lambda n: n  # calls of the denoiser for n steps
    aliases: tuple[str, ...] = ()
    custom: tuple[str, ...] = ()  # "timesteps", "sigmas": which the caller may give
    rows_per_step: int = 1  # diffusers' scheduler.order: how many rows one step of image to image skips
    takes_eta: bool = False  # eta above 0 adds noise

    @property
    def family(self) -> str:
        """What kind of trained model it samples: diffusion, edm, flow, or ipndm's own."""
        if self.forced.get("use_flow_sigmas"):
            return "flow"
        marks = {"beta_schedule": "diffusion", "sigma_data": "edm", "shift": "flow"}
        return next((family for option, family in marks.items() if option in self.defaults), self.name)


_DPM, _DPM_SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_PLUS: Mapping[str, Any] = {"algorithm_type": "dpmsolver++"}
_SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
_FLOW: Mapping[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def _twice(n: int) -> int:
    return 2 * n - 1


_ALL = (
    Sampler("ddim", "DDIM", ddim, "DDIMScheduler", defaults_of.DDIM, 1, "arXiv:2010.02502",
            takes_eta=True, aliases=("DDIMParallelScheduler",)),
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
            custom=("timesteps",), rows_per_step=2),
    Sampler("dpm2", "DPM2", dpm2, "KDPM2DiscreteScheduler", defaults_of.KDPM2, 2, "arXiv:2206.00927", calls=_twice,
            rows_per_step=2, aliases=("kdpm2",)),
    Sampler("dpm2_a", "DPM2 a", dpm2_a, "KDPM2AncestralDiscreteScheduler", defaults_of.KDPM2, 2, "arXiv:2206.00927",
            stochastic=True, calls=_twice, rows_per_step=2, aliases=("kdpm2_a", "dpm2 ancestral")),
    Sampler("dpmpp_2m", "DPM++ 2M", dpm_multistep, _DPM, defaults_of.DPM, 2, "arXiv:2211.01095",
            {**_PLUS, "solver_order": 2}, custom=("timesteps",)),
    Sampler("dpmpp_3m", "DPM++ 3M", dpm_multistep, _DPM, defaults_of.DPM, 3, "arXiv:2211.01095",
            {**_PLUS, "solver_order": 3}, custom=("timesteps",)),
    Sampler("dpmpp_2m_sde", "DPM++ 2M SDE", dpm_multistep, _DPM, defaults_of.DPM, 2, "arXiv:2211.01095",
            {**_SDE, "solver_order": 2}, stochastic=True, custom=("timesteps",)),
    Sampler("dpmpp_3m_sde", "DPM++ 3M SDE", dpm_multistep, _DPM, defaults_of.DPM, 3, "arXiv:2211.01095",
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
    Sampler("tcd", "TCD", tcd, "TCDScheduler", defaults_of.LCM, 1, "arXiv:2402.19159", takes_eta=True,
            custom=("timesteps",)),
    Sampler("edm_euler", "EDM Euler", edm_euler, "EDMEulerScheduler", defaults_of.EDM, 1, "arXiv:2206.00364"),
    Sampler("edm_dpmpp_2m", "EDM DPM++ 2M", edm_dpm, "EDMDPMSolverMultistepScheduler", defaults_of.EDM_DPM, 2,
            "arXiv:2211.01095", {**_PLUS, "solver_order": 2}),
    Sampler("flow_euler", "Flow Euler", flow_euler, "FlowMatchEulerDiscreteScheduler", defaults_of.FLOW_EULER, 1,
            "arXiv:2210.02747", custom=("timesteps", "sigmas")),
    Sampler("flow_heun", "Flow Heun", flow_heun, "FlowMatchHeunDiscreteScheduler", defaults_of.FLOW_HEUN, 2,
            "arXiv:2206.00364", calls=_twice, rows_per_step=2),
    Sampler("flow_dpmpp_2m", "Flow DPM++ 2M", dpm_multistep, _DPM, defaults_of.FLOW_DPM, 2, "arXiv:2211.01095",
            {**_PLUS, **_FLOW, "solver_order": 2}),
    Sampler("flow_dpmpp_2m_sde", "Flow DPM++ 2M SDE", dpm_multistep, _DPM, defaults_of.FLOW_DPM, 2,
            "arXiv:2211.01095", {**_SDE, **_FLOW, "solver_order": 2}, stochastic=True),
)  # fmt: skip

SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _ALL}
SCHEDULES = (*SCHEDULE_FLAGS, "normal", "sgm_uniform", "simple", "leading", "linspace", "trailing")


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


def names_class(name: str, entry: Sampler) -> bool:
    """Whether `name` is a diffusers class, which keeps all of a checkpoint's options, and not a sampler's own name."""
    return _normal(name).removesuffix("scheduler") == _normal(entry.diffusers).removesuffix("scheduler")


def _normal(name: str) -> str:
    """Names compared without case, spaces, underscores and dashes; + counts."""
    return "".join(c for c in name.lower().replace("++", "pp") if c.isalnum())


_NAMES: dict[str, str] = {}
for _entry in reversed(_ALL):  # the first of those that share a class is the one that the class name means
    for _name in (_entry.name, _entry.title, _entry.diffusers, *_entry.aliases):
        _NAMES[_normal(_name)] = _entry.name
        _NAMES[_normal(_name).removesuffix("scheduler")] = _entry.name
