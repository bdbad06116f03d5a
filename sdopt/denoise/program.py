"""A step is a program: the launches of every call of a request, chosen before the loop begins.

    program = compile_program(plan, canvas, guided=True)
    program.launches[k]      [Predict, Advance]            on the host: the UNet, then the sampler's row in NumPy
                             [Fused("unet_step")]          on a device: one engine that does both
                             [..., Restore]                and a mask puts back what it keeps

A launch reads and writes tensors of a board by name (`sdopt.denoise.board`). What comes to a step goes in here as a
further launch: a ControlNet before the UNet, a feature cache in its place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sdopt.bundle.specs import Array
from sdopt.denoise.model import Predict, scale_embedding
from sdopt.denoise.start import Canvas
from sdopt.request.plan import Plan
from sdopt.samplers.packed import packed
from sdopt.samplers.table import SamplerTable

STEP, STEP_ALONE = "unet_step", "unet_step_alone"  # one whole step with guidance, and of the conditional half alone


@dataclass(frozen=True)
class Advance:
    """The sampler's row in NumPy: sample, prediction, history and noise become the next sample."""


@dataclass(frozen=True)
class Restore:
    """What the mask keeps is put back into the sample, at the noise level of the next call."""


@dataclass(frozen=True)
class Fused:
    """One call of an engine that makes a whole step (see `sdopt.build.fuse_step`)."""

    component: str


Launch = Predict | Advance | Restore | Fused


@dataclass(frozen=True, eq=False)
class Program:
    """What a request launches, call by call; `images` is the number of its images.

    `scales` [calls]: the guidance scale. `rescale` and `embedding` are those of `Predict`.
    """

    table: SamplerTable
    launches: tuple[tuple[Launch, ...], ...]
    images: int
    scales: tuple[float, ...]
    rescale: float = 0.0
    embedding: int = 0

    @cached_property
    def levels(self) -> list[tuple[float, float]]:
        """The timestep and the noise level of every call."""
        return list(zip(self.table.timestep.tolist(), self.table.sigma.tolist(), strict=True))

    @property
    def engines(self) -> tuple[str, ...]:
        """The components that are launched."""
        launches = dict.fromkeys(launch for call in self.launches for launch in call)
        named = (_engine_of(launch) for launch in launches)
        return tuple(dict.fromkeys(name for name in named if name))

    @property
    def fused(self) -> bool:
        """Whether whole steps are made by engines."""
        return any(isinstance(launch, Fused) for launch in self.launches[0])

    def tables(self) -> dict[str, Array]:
        """What fused engines are told in each call, [calls, images, width]."""
        guided = any(launch == Fused(STEP) for call in self.launches for launch in call)
        scales = [max(1.0, scale) if guided and not self.embedding else 1.0 for scale in self.scales]
        tables = {"row": packed(self.table, scales, self.rescale)}
        if self.embedding:
            tables["timestep_cond"] = np.stack([scale_embedding(s - 1, self.embedding) for s in self.scales])
        return {name: np.repeat(table[:, None], self.images, 1) for name, table in tables.items()}


def _engine_of(launch: Launch) -> str:
    if isinstance(launch, Fused):
        return launch.component
    return "unet" if isinstance(launch, Predict) else ""


def compile_program(
    plan: Plan, canvas: Canvas, *, guided: bool, built: Collection[str] = (), needs_built: bool = False
) -> Program:
    """The program of a plan. `guided`: there is a negative half; `built` and `needs_built`: see `fused_component`."""
    calls = [guided and scale > 1 for scale in plan.guidance]
    last: tuple[Launch, ...] = () if canvas.mask is None else (Restore(),)
    fused = fused_component(guided, built, needs_built)
    launches: list[tuple[Launch, ...]] = []
    for call in calls:
        if fused is None:
            launches.append((_predict(plan, call, canvas.extra is not None), Advance(), *last))
        else:
            launches.append((Fused(_step_of(fused, call, built)), *last))
    return Program(
        plan.table, tuple(launches), len(plan.seeds), plan.guidance, plan.guidance_rescale, plan.guidance_embedding
    )


def _predict(plan: Plan, guided: bool, joins: bool) -> Predict:
    together = plan.guidance_batch == 2
    if not guided:
        return Predict(False, embedding=plan.guidance_embedding, joins=joins)
    return Predict(True, together, plan.guidance_rescale, plan.guidance_embedding, joins)


def _step_of(fused: str, guided: bool, built: Collection[str]) -> str:
    """The engine of one call: where guidance is off, the one without it takes half of the time, if it is built."""
    return STEP_ALONE if not guided and STEP_ALONE in built else fused


def fused_component(guided: bool, built: Collection[str], needs_built: bool = False) -> str | None:
    """Which of the `built` components makes whole steps; None if the UNet alone is called.

    `needs_built`: the backend runs nothing else. Where it has no UNet that fits, this names the engine that is missing:
    opening it tells how to build it.
    """
    wanted = (STEP,) if guided else (STEP_ALONE, STEP)
    fused = next((name for name in wanted if name in built), None)
    return wanted[0] if fused is None and needs_built and "unet" not in built else fused
