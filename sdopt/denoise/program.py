"""A step is a program: the launches of every call of a request, chosen before the loop begins.

    program = compile_program(plan, canvas, guided=True)
    program.launches[k]      [Predict, Advance]            on the host: the UNet, then the sampler's row in NumPy
                             [Fused("unet_step")]          on a device: one engine that does both
                             [Fused("unet_step.canny")]    the same with the ControlNet canny inside
                             [Fused("unet_step+ip_adapter")]     the same that takes image prompts
                             [Predict(cached=...), Advance]    with a feature cache: a full UNet, or a shallow one
                             [Fused("unet_step_deep_2")]   the same on a device; unet_step_shallow_2 in shallow calls
                             [..., Restore]                and a mask puts back what it keeps

A launch reads and writes tensors of a board by name (`sdopt.denoise.board`). What comes to a step goes in here as a
further launch: a ControlNet before the UNet, for example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from functools import cached_property

import numpy as np

from sdopt.bundle.adapter import IMAGE_ENCODER, IMAGE_PROJECTION, IP_ADAPTER, T2I_ADAPTER, adapter_component
from sdopt.bundle.format import UNET
from sdopt.bundle.joined import FEATURE_SCALE, PLAIN, SCALE, Steering, engine_of, scale_input
from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.denoise.cache import Cached
from sdopt.denoise.control import Control
from sdopt.denoise.model import Predict, scale_embedding
from sdopt.denoise.start import Canvas
from sdopt.errors import UsageError
from sdopt.request.control import Control as ControlNet
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

    `scales` [calls]: the guidance scale between the halves; `told` [calls]: the one that the denoiser takes, empty if
    it takes none. `rescale`, `embedding` and `denoiser` are those of `Predict`.
    """

    table: SamplerTable
    launches: tuple[tuple[Launch, ...], ...]
    images: int
    scales: tuple[float, ...]
    rescale: float = 0.0
    embedding: int = 0
    # what ControlNets are told, [calls, width], by their names and those of their inputs
    inputs_of_controls: Mapping[str, Mapping[str, Float32]] = field(default_factory=dict[str, Mapping[str, Float32]])
    guess_mode: bool = False
    told: tuple[float, ...] = ()
    denoiser: str = UNET
    feature_calls: int = 0  # in so many calls, from the first on, the features of T2I-Adapters are added

    @cached_property
    def controls(self) -> list[dict[str, dict[str, Float32]]]:
        """What ControlNets are told in each call, [images, width], by their names and those of their inputs."""
        named = self.inputs_of_controls.items()
        return [
            {
                net: {name: np.repeat(rows[k : k + 1], self.images, 0) for name, rows in own.items()}
                for net, own in named
            }
            for k in range(len(self.table))
        ]

    @property
    def told_scales(self) -> list[tuple[float, ...]]:
        """The scale that the denoiser takes in each call, alone or not at all."""
        return [(scale,) for scale in self.told] if self.told else [()] * len(self.table)

    @cached_property
    def levels(self) -> list[tuple[float, float]]:
        """The timestep and the noise level of every call."""
        return list(zip(self.table.timestep.tolist(), self.table.sigma.tolist(), strict=True))

    @property
    def engines(self) -> tuple[str, ...]:
        """The components that are launched."""
        launches = dict.fromkeys(launch for call in self.launches for launch in call)
        return tuple(dict.fromkeys(name for launch in launches for name in engines_of(launch)))

    @property
    def fused(self) -> bool:
        """Whether whole steps are made by engines."""
        return any(isinstance(launch, Fused) for launch in self.launches[0])

    def tables(self) -> dict[str, Array]:
        """What fused engines are told in each call, [calls, images, width]."""
        guided = any(engine_of(name) == STEP for name in self.engines)
        scales = [max(1.0, scale) if guided else 1.0 for scale in self.scales]
        tables = {"row": packed(self.table, scales, self.rescale)}
        if self.embedding:
            tables["timestep_cond"] = np.stack([scale_embedding(s - 1, self.embedding) for s in self.told])
        for name, own in self.inputs_of_controls.items():
            tables[scale_input(name)] = own[SCALE]
            tables[f"negative_{scale_input(name)}"] = own[SCALE] * np.float32(not self.guess_mode)
        if self.feature_calls:
            tables[FEATURE_SCALE] = (np.arange(len(self.table)) < self.feature_calls).astype(np.float32)[:, None]
        return {name: np.repeat(table[:, None], self.images, 1) for name, table in tables.items()}


def engines_of(launch: Launch) -> tuple[str, ...]:
    """The engines that a launch calls, the UNet's first."""
    if isinstance(launch, Fused):
        return (launch.component,)
    return launch.engines if isinstance(launch, Predict) else ()


def compile_program(
    plan: Plan, canvas: Canvas, *, guided: bool, built: Collection[str] = (), needs_built: bool = False
) -> Program:
    """The program of a plan. `guided`: there is a negative half; `built` and `needs_built`: see `fused_component`."""
    calls = [guided and scale > 1 for scale in plan.guidance]
    last: tuple[Launch, ...] = () if canvas.mask is None else (Restore(),)
    controls = [control for control in plan.controls if control.scales.any()]  # one that never runs is none
    unions = [control.name for control in controls if control.union is not None]
    if unions and needs_built:
        raise UsageError(
            f"{unions[0]} is a union ControlNet, which no engine of `sdopt build` runs; take ONNX Runtime or OpenVINO: "
            'sdopt.load(BUNDLE, "ort"), or --backend ort'
        )
    steering = _steering(plan, controls)
    cached = _cached(plan, calls)
    only_host = bool(unions) or plan.denoiser != UNET  # no engine makes whole steps of these
    fused = None if only_host else fused_component(guided, built, needs_built, steering)
    if plan.cache is not None:
        fused = cached_step(guided, built, plan.cache.depth, needs_built)
    launches: list[tuple[Launch, ...]] = []
    for k, call in enumerate(calls):
        own = cached[k]
        if fused is None:
            launches.append((_predict(plan, controls, k, call, canvas.extra is not None, own), Advance(), *last))
            continue
        if own is not None:
            launches.append((Fused(own.engine(fused)), *last))
            continue
        here = _steering(plan, controls, k)
        less = None if here == steering else fused_component(guided, built, steering=here)
        launches.append((Fused(_step_of(less or fused, call, built)), *last))
    return Program(
        plan.table,
        tuple(launches),
        len(plan.seeds),
        plan.guidance,
        plan.guidance_rescale,
        plan.guidance_embedding,
        {control.name: control.inputs for control in controls},
        plan.guess_mode,
        plan.guidance_input,
        plan.denoiser,
        max((one.calls for one in plan.features), default=0),
    )


def engines_beside(plan: Plan) -> tuple[str, ...]:
    """The components that run for a plan's adapters before the loop."""
    encoders = [one.name for one in plan.image_prompts if one.pixels is not None]
    return (
        *(adapter_component(name, IMAGE_ENCODER) for name in encoders),
        *(adapter_component(one.name, IMAGE_PROJECTION) for one in plan.image_prompts),
        *(adapter_component(one.name, T2I_ADAPTER) for one in plan.features if one.calls),
    )


def _steering(plan: Plan, controls: Sequence[ControlNet], k: int | None = None) -> Steering:
    """What steers a request, or its call `k`. In a call, either all of its ControlNets are there or none."""
    runs_net = k is None or any(control.scales[k].any() for control in controls)
    featured = any((k or 0) < one.calls for one in plan.features)
    nets = tuple(control.name for control in controls) if runs_net else ()
    kinds = ((T2I_ADAPTER,) if featured else ()) + ((IP_ADAPTER,) if plan.image_prompts else ())
    return Steering(tuple(sorted(nets)), tuple(sorted(kinds)))


def _cached(plan: Plan, calls: Sequence[bool]) -> list[Cached | None]:
    """What each call does with deep features. `calls`: which are guided.

    A call that is guided takes features of a guided one alone, and one that is not those of one that is not.
    """
    cache = plan.cache
    if cache is None:
        return [None] * len(calls)
    changes = [k > 0 and calls[k] != calls[k - 1] for k in range(len(calls))]
    return [Cached(cache.depth, not (own or change)) for own, change in zip(cache.full, changes, strict=True)]


def _predict(
    plan: Plan, controls: Sequence[ControlNet], k: int, guided: bool, joins: bool, cached: Cached | None
) -> Predict:
    control = None
    if controls or plan.features:
        nets = tuple(control.name for control in controls if control.scales[k].any())
        control = Control(nets, plan.guess_mode, tuple(one.name for one in plan.features if k < one.calls))
    pictured = bool(plan.image_prompts)
    embedding, name = plan.guidance_embedding, plan.denoiser
    if not guided:
        return Predict(
            False, embedding=embedding, joins=joins, control=control, pictured=pictured, cached=cached, denoiser=name
        )
    together, rescale = plan.guidance_batch == 2, plan.guidance_rescale
    return Predict(True, together, rescale, embedding, joins, control, pictured, cached, name)


def _step_of(fused: str, guided: bool, built: Collection[str]) -> str:
    """The engine of one call: where guidance is off, the one without it takes half of the time, if it is built."""
    alone = Steering.of(fused).named(STEP_ALONE)
    return alone if not guided and alone in built else fused


def cached_step(guided: bool, built: Collection[str], depth: int, needs_built: bool) -> str | None:
    """Which step has both engines of a feature cache among those that are `built`; None if there is none.

    It makes every call: where guidance is off for a while, one that guides still makes both halves.
    `needs_built`: the backend runs nothing else; then it names the step whose engines are missing.
    """
    steps = (STEP,) if guided else (STEP_ALONE, STEP)
    pairs = {step: {Cached(depth, takes).engine(step) for takes in (False, True)} for step in steps}
    return next((step for step, pair in pairs.items() if pair <= set(built)), steps[0] if needs_built else None)


def fused_component(
    guided: bool, built: Collection[str], needs_built: bool = False, steering: Steering = PLAIN
) -> str | None:
    """Which of the `built` components makes whole steps, with exactly this steering; None if there is none.

    `needs_built`: the backend runs nothing else. Where it has no UNet that fits, this names the engine that is missing:
    opening it tells how to build it.
    """
    wanted = [steering.named(name) for name in ((STEP,) if guided else (STEP_ALONE, STEP))]
    fused = next((name for name in wanted if name in built), None)
    return wanted[0] if fused is None and needs_built and (steering or "unet" not in built) else fused
