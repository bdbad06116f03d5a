"""How a component is quantized: scales from a denoising run, and the layers that stay as they are.

    calibration = calibrate(bundle, "unet", prompts)      # runs the pipeline in float32, with an `Observer` inside
    scalings, reached = calibration.searched(30.0, print)
    int8(model, scalings)                                 # see `sdopt.build.int8`

Scales come from what the layers multiply in that run, at all of its timesteps. For each layer two errors are measured:
that in its own output, and that in the output of the component. Layers stay as they are, those first that do most harm
for the time that they save, until the component's output is as close to float32 as the floor demands. That is checked
in calls of a prompt from which no scale was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from sdopt import graph
from sdopt.build.choices import Choice, choices_of, decibels
from sdopt.build.int8 import Arithmetic, Scaling, int8
from sdopt.build.observe import Observer
from sdopt.build.sensitivity import output_errors
from sdopt.bundle.files import Bundle, Component
from sdopt.bundle.format import DENOISERS
from sdopt.bundle.specs import Array, Float32
from sdopt.bundle.unfinished import scratch
from sdopt.dataclass import dataclass
from sdopt.engine import Engine
from sdopt.engine.ort import OrtEngine
from sdopt.engine.pool import EnginePool
from sdopt.errors import UsageError
from sdopt.pipeline import Pipeline

LEAST_PART = 0.3  # of the multiply-adds: with less in int8, nothing is gained
STEPS = 6
HELD_OUT = 4  # calls by which the output is judged
SUBJECTS = (
    "a photo of a red fox in a snowy forest, soft morning light",
    "an oil painting of a harbour with small boats at sunset",
    "a close-up portrait of an old fisherman with a grey beard",
    "a bowl of ramen on a wooden table, shallow depth of field",
    "a blue sports car on a wet street at night, neon signs",
    "a watercolour of mountains and a lake with pine trees",
)
ON_CPU = Arithmetic(unsigned=True)
Report = Callable[[str], None]
Opened = Callable[[Component], Engine]  # a graph on a library


@dataclass(frozen=True, eq=False)
class Calibration:
    """The layers of a component by the names of their weights; `held_out`: (inputs, output) of calls in float32.

    `latents`: what the prompts became, if the component was seen to denoise them.
    """

    component: Component
    choices: Mapping[str, Choice]
    held_out: tuple[tuple[dict[str, Array], Float32], ...]
    latents: tuple[Array, ...] = ()

    def scalings(self, floor: float = -math.inf, most: int | None = None) -> dict[str, Scaling]:
        """The scalings of the layers that become int8, so that the sum of their harm is `floor` dB below the output.

        The others stay as they are, those first that do most harm for the multiply-adds that they cost. `most`: how
        many may become int8.
        """
        choices = self.choices
        order = sorted(choices, key=lambda name: choices[name].harm / choices[name].products)[:most]
        while order and decibels(sum(choices[name].harm for name in order)) < floor:
            order.pop()
        return {name: choices[name].scaling for name in order}

    @property
    def kind(self) -> str:
        """What its layers become, int8 or fp8."""
        return next((choice.scaling.kind for choice in self.choices.values()), "int8")

    def part(self, scalings: Mapping[str, Scaling]) -> float:
        """The part of all multiply-adds that these layers make."""
        return sum(self.choices[name].products for name in scalings) / sum(c.products for c in self.choices.values())

    def searched(self, floor: float, report: Report, opened: Opened = OrtEngine) -> tuple[dict[str, Scaling], float]:
        """(the scalings with which the output reaches `floor` dB, the dB that it reaches), on the library of `opened`.

        Raises: UsageError if hardly a layer would be left.
        """
        aim, scalings = floor, self.scalings(floor)
        while (part := self.part(scalings)) >= LEAST_PART:
            reached = self.fidelity(scalings, opened)
            report(
                f"{len(scalings)} of {len(self.choices)} layers in {self.kind}, {part:.0%} of their multiply-adds: "
                f"{reached:.1f} dB beside float32"
            )
            if reached >= floor:
                return scalings, reached
            aim += floor - reached  # the sum of harms promised more than it holds
            scalings = self.scalings(aim, most=len(scalings) - 1)
        fewest = (self.scalings(most=count) for count in range(1, len(self.choices) + 1))
        best = self.fidelity(next(one for one in fewest if self.part(one) >= LEAST_PART), opened)
        raise UsageError(
            f"{self.component.name}: in {self.kind} it reaches {floor:g} dB only where most layers stay as they are; "
            f"give a lower --floor, e.g. {max(0, math.floor(best)):g}, or more --prompts: the last one judges the "
            "scales that are found with the others",
            "floor",
        )

    def fidelity(self, scalings: Mapping[str, Scaling], opened: Opened = OrtEngine) -> float:
        """The power of the output over the power of its error, in dB, over the calls that were held out.

        `opened` gives the library that computes it.
        """
        model = graph.load(self.component.graph)
        int8(model, scalings)
        noise = power = 0.0
        with scratch() as folder:
            graph.save(model, folder / "int8.onnx")
            name = self.component.outputs[0].name
            with opened(replace(self.component, graph=folder / "int8.onnx")) as engine:
                for arrays, exact in self.held_out:
                    output = engine(**arrays)[name]
                    noise += float(np.square(output - exact, dtype=np.float64).sum())
                    power += float(np.square(exact, dtype=np.float64).sum())
        return decibels(noise / power)


def calibrate(
    bundle: Bundle,
    name: str,
    prompts: Sequence[str] = SUBJECTS,
    *,
    arithmetic: Arithmetic = ON_CPU,
    latents: Sequence[Array] = (),
    steps: int = STEPS,
    seed: int = 0,
    report: Report = lambda line: None,
) -> Calibration:
    """Make pictures in float32, and choose how each layer of component `name` becomes int8.

    `latents`: of the same prompts, for the decoder; without them the pictures are denoised for it. The last prompt
    gives the calls that are held out. The same arguments give the same numbers.
    Raises: UsageError for fewer than two prompts.
    """
    if len(prompts) < 2:
        raise UsageError(f"{len(prompts)} prompts; int8 needs two or more: the last one judges the scales", "prompts")
    component = bundle.component(name)
    with scratch() as folder:
        observer = Observer(
            component, folder, calls=(len(prompts) - 1) * (steps if name in DENOISERS else 1), seed=seed
        )
        with closing(observer):
            held_out, denoised = _run(bundle, observer, prompts, latents, steps, seed, report)
            seen = observer.seen
        choices = choices_of(component, seen, arithmetic)
        report(f"the harm that each of {len(choices)} layers does")
        noises = {name: choice.noise for name, choice in choices.items()}
        harms = output_errors(component, noises, held_out, folder)
    choices = {name: replace(choice, harm=harms[name]) for name, choice in choices.items()}
    return Calibration(component, choices, tuple(held_out), tuple(denoised))


class _Recorder:
    """An engine that keeps the inputs and the output of its calls."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.calls: list[tuple[dict[str, Array], Float32]] = []

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        results: dict[str, Array] = self._engine(**arrays)
        kept = {name: np.array(array) for name, array in arrays.items()}
        self.calls.append((kept, results[self.outputs[0].name].astype(np.float32)))
        return results

    def close(self) -> None: ...

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *error: object) -> None: ...


def _run(
    bundle: Bundle,
    observer: Observer,
    prompts: Sequence[str],
    latents: Sequence[Array],
    steps: int,
    seed: int,
    report: Report,
) -> tuple[list[tuple[dict[str, Array], Float32]], list[Array]]:
    """(some calls of the last prompt, by which the scales are judged; the latents of each prompt).

    A picture of each prompt is denoised, and decoded if the decoder is observed. With `latents` it is only decoded.
    """
    recorder = _Recorder(observer)
    given: dict[str, Engine] = {observer.name: recorder}
    denoised: list[Array] = []
    with Pipeline(EnginePool(bundle, "ort", precision="fp32", memory="low", given=given)) as pipe:
        for k, prompt in enumerate(prompts):
            observer.is_judging = k == len(prompts) - 1
            recorder.calls.clear()
            report(f"prompt {k + 1} of {len(prompts)}: {prompt}")
            if latents:
                denoised.append(latents[k])
            else:
                denoised.append(pipe(prompt, num_inference_steps=steps, seed=seed + k, output_type="latent").images)
            if observer.name == "vae_decoder":
                pipe.decode(denoised[-1], "np")
    # in the middle of equal parts: the last call's error, e.g., hardly moves the picture
    chosen = {int(len(recorder.calls) * (k + 0.5) / HELD_OUT) for k in range(HELD_OUT)}
    return [recorder.calls[index] for index in sorted(chosen)], denoised
