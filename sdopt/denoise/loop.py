"""The denoising loop, twice: with the sampler's row taken in NumPy, or inside of a fused engine on its device.

    host_steps     output = denoiser(c_in * x, t);  x, history = table.advance(...)        any UNet
    fused_steps    run.launch(k), N times; x, history and the previews stay on the device   a `unet_step` engine

Both yield the same steps. On a device, a step's data is fetched when it is asked for, and not at all if it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from sdopt.bundle.specs import Float32, Scalar
from sdopt.denoise.model import Denoiser, scale_embedding
from sdopt.denoise.start import Canvas, Draw
from sdopt.engine import Carrying, Engine, Run
from sdopt.engine.finite import refuse_nan
from sdopt.errors import SdoptError, UsageError
from sdopt.request.plan import Plan
from sdopt.samplers.packed import packed

STEP, STEP_ALONE = "unet_step", "unet_step_alone"  # one whole step with guidance, and of the conditional half alone


@dataclass(frozen=True)
class Step:
    """What `denoise` yields after each call of the UNet; `sample` is live: writing into it steers the loop.

    Shapes: sample and denoised [images, channels, latent_height, latent_width] float32.
    Raises: NumericsError where they hold NaN or infinity; UsageError for data on a device that the loop has left
    behind.
    """

    index: int
    of: int
    timestep: float
    sigma: float
    _data: Callable[[str], Float32]

    @cached_property
    def sample(self) -> Float32:
        """The latents after this step."""
        return self._data("next_sample")

    @cached_property
    def denoised(self) -> Float32:
        """What the sampler believes the clean latents to be."""
        return self._data("denoised")


def host_steps(plan: Plan, canvas: Canvas, denoiser: Denoiser, draw: Draw) -> Iterator[Step]:
    """The steps of a plan, the row of the table taken in NumPy."""
    table = plan.table
    sample, history = canvas.sample, tuple[Float32, ...]()
    c_in: list[Scalar] = table.c_in.tolist()
    for k, timestep in enumerate(table.timestep):
        output = denoiser(sample * c_in[k], timestep, plan.guidance[k])
        refuse_nan(output, f"unet, step {k + 1} of {len(table)}")
        denoised = table.clean(k, sample, output)
        sample, history = table.advance(k, sample, output, history, draw() if table.draws[k] else None)
        sample = canvas.hold(table, k, sample)
        data = {"next_sample": sample, "denoised": denoised}
        yield Step(k, len(table), float(timestep), float(table.sigma[k]), data.__getitem__)


def fused_component(guided: bool, built: Collection[str], needs_built: bool = False) -> str | None:
    """Which of the `built` components makes whole steps; None if the UNet alone is called.

    `needs_built`: the backend runs nothing else. Where it has no UNet that fits, this names the engine that is missing:
    opening it tells how to build it.
    """
    wanted = (STEP,) if guided else (STEP_ALONE, STEP)
    fused = next((name for name in wanted if name in built), None)
    return wanted[0] if fused is None and needs_built and "unet" not in built else fused


def fused_steps(
    plan: Plan,
    canvas: Canvas,
    engine: Engine,
    cond: Mapping[str, Float32],
    negative: Mapping[str, Float32] | None,
    draw: Draw,
) -> Iterator[Step]:
    """The steps of a plan, each one launch of a fused engine; see `sdopt.build.fuse_step` for what it takes."""
    table = plan.table
    carrying = cast(Carrying, engine)
    names = {spec.name for spec in engine.inputs}
    inputs = {"sample": canvas.sample, **cond}
    if canvas.extra is not None:
        inputs["extra"] = canvas.extra
    if any(name.startswith("negative_") for name in names):
        inputs |= {f"negative_{name}": array for name, array in (negative or cond).items()}
    scales = [max(1.0, scale) if negative is not None else 1.0 for scale in plan.guidance]
    tables = {"row": packed(table, scales, plan.guidance_rescale)}
    if plan.guidance_embedding:
        tables["timestep_cond"] = np.stack([scale_embedding(s - 1, plan.guidance_embedding) for s in plan.guidance])
    run = carrying.begin({n: np.ascontiguousarray(a, np.float32) for n, a in inputs.items()}, tables)
    current = _Current(run, len(table))
    try:
        for k, timestep in enumerate(table.timestep):
            noise = {"noise": draw()} if table.draws[k] else {}
            current.leave()
            run.launch(k, **noise)
            step = current.step(k, float(timestep), float(table.sigma[k]))
            if canvas.mask is not None:
                current.steer(canvas.hold(table, k, step.sample))
            yield step
            current.steer()
        current.end()
    except BaseException:  # it is the error to tell, whatever else fails after it
        with suppress(SdoptError):
            current.end()
        raise
    finally:
        run.close()


class _Current:
    """The step whose data is on the device now."""

    def __init__(self, run: Run, of: int) -> None:
        self._run, self._of = run, of
        self._kept: dict[str, Float32] = {}  # what was fetched of the current step, as it was then
        self._k = -1

    def step(self, k: int, timestep: float, sigma: float) -> Step:
        """Step `k`, just launched; the data of those before it is gone."""
        self._k, self._kept = k, {}
        self.latest = Step(k, self._of, timestep, sigma, lambda name: self._fetch(k, name))
        return self.latest

    def leave(self) -> None:
        """The device goes on: from here on nobody can tell what it holds of the step, should the launch fail."""
        self._k = -1

    def _fetch(self, k: int, name: str) -> Float32:
        if k != self._k:
            raise UsageError(
                f"step {k + 1} of {self._of}: its data was on the GPU until the next step; "
                "read step.sample or step.denoised while it is the latest"
            )
        if name not in self._kept:
            self._kept[name] = self._run.fetch(name)
        kept = self._kept[name]
        refuse_nan(kept, f"unet, step {k + 1} of {self._of}")
        return np.array(kept)

    def steer(self, sample: Float32 | None = None) -> None:
        """Send the sample back if somebody changed it; `sample` is what to change it to."""
        if "sample" not in vars(self.latest):
            return
        if sample is not None:
            self.latest.sample[...] = sample
        if not np.array_equal(self.latest.sample, self._kept["next_sample"]):
            self._run.put("sample", self.latest.sample)
            self._kept["next_sample"] = self.latest.sample.copy()

    def end(self) -> None:
        """Keep the data of the step with which the loop ends, or is left."""
        for name in ("next_sample", "denoised") if self._k >= 0 else ():
            if name not in self._kept:
                self._kept[name] = self._run.fetch(name)
