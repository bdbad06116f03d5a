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
from sdopt.build.int8 import (
    LARGEST,
    Arithmetic,
    Layer,
    Scaling,
    int8,
    layers_of,
    norm_before,
    rounded,
    smoothed,
    weight_scale,
)
from sdopt.build.observe import Observer, Seen
from sdopt.build.sensitivity import output_errors
from sdopt.bundle.files import Bundle, Component
from sdopt.bundle.specs import Array, Float32
from sdopt.bundle.unfinished import scratch
from sdopt.dataclass import dataclass
from sdopt.engine import Engine
from sdopt.engine.ort import OrtEngine
from sdopt.engine.pool import EnginePool
from sdopt.errors import UsageError
from sdopt.pipeline import Pipeline

MOSTLY_POSITIVE = 0.5  # a tensor whose lowest value is above this part of the highest one, below zero, becomes uint8
EXPONENTS = (0.5, 0.7)  # of the input's largest values in the factors (Xiao et al. 2022, eq. 4: alpha)
WORTH_NOTHING, WORTH_A_PRODUCT = 0.5, 3.0  # dB that factors must gain, inside of a norm and as a product of their own
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
class Choice:
    """How one layer becomes int8, and what that does.

    `noise`, `error`: the mean square of the error in its own output, and the same over the output's. `harm`: the power
    of the error in the component's output over that of the output. `products`: multiply-adds in one call.
    """

    scaling: Scaling
    noise: float
    error: float
    products: int = 0
    harm: float = 0.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """The layers of a component by the names of their weights; `held_out`: (inputs, output) of calls in float32."""

    component: Component
    choices: Mapping[str, Choice]
    held_out: tuple[tuple[dict[str, Array], Float32], ...]

    def scalings(self, floor: float = -math.inf, most: int | None = None) -> dict[str, Scaling]:
        """The scalings of the layers that become int8, so that the sum of their harm is `floor` dB below the output.

        The others stay as they are, those first that do most harm for the multiply-adds that they cost. `most`: how
        many may become int8.
        """
        choices = self.choices
        order = sorted(choices, key=lambda name: choices[name].harm / choices[name].products)[:most]
        while order and _db(sum(choices[name].harm for name in order)) < floor:
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
            f"give a lower --floor, e.g. {max(0, math.floor(best)):g}",
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
        return _db(noise / power)


def calibrate(
    bundle: Bundle,
    name: str,
    prompts: Sequence[str] = SUBJECTS,
    *,
    arithmetic: Arithmetic = ON_CPU,
    steps: int = STEPS,
    seed: int = 0,
    report: Report = lambda line: None,
) -> Calibration:
    """Make pictures in float32, and choose how each layer of component `name` becomes int8.

    The last prompt gives the calls that are held out. The same arguments give the same numbers.
    Raises: UsageError for fewer than two prompts.
    """
    if len(prompts) < 2:
        raise UsageError(f"{len(prompts)} prompts; int8 needs two or more: the last one judges the scales", "prompts")
    component = bundle.component(name)
    with scratch() as folder:
        observer = Observer(component, folder, calls=(len(prompts) - 1) * (steps if name == "unet" else 1), seed=seed)
        with closing(observer):
            held_out = _run(bundle, observer, prompts, steps, seed, report)
            seen = observer.seen
        choices = _choices(component, seen, arithmetic)
        report(f"the harm that each of {len(choices)} layers does")
        harms = output_errors(component, {name: choice.noise for name, choice in choices.items()}, held_out, folder)
    choices = {name: replace(choice, harm=harms[name]) for name, choice in choices.items()}
    return Calibration(component, choices, tuple(held_out))


def _db(ratio: float) -> float:
    return -10 * math.log10(max(ratio, 1e-30))


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
    bundle: Bundle, observer: Observer, prompts: Sequence[str], steps: int, seed: int, report: Report
) -> list[tuple[dict[str, Array], Float32]]:
    """Make a picture of each prompt; some calls of the last one, by which the scales are judged."""
    recorder = _Recorder(observer)
    given: dict[str, Engine] = {observer.name: recorder}
    with Pipeline(EnginePool(bundle, "ort", precision="fp32", memory="low", given=given)) as pipe:
        for k, prompt in enumerate(prompts):
            observer.is_judging = k == len(prompts) - 1
            recorder.calls.clear()
            report(f"prompt {k + 1} of {len(prompts)}: {prompt}")
            pipe(prompt, num_inference_steps=steps, seed=seed + k)
    # in the middle of equal parts: the last call's error, e.g., hardly moves the picture
    chosen = {int(len(recorder.calls) * (k + 0.5) / HELD_OUT) for k in range(HELD_OUT)}
    return [recorder.calls[index] for index in sorted(chosen)]


def _choices(component: Component, seen: Mapping[str, Seen], arithmetic: Arithmetic) -> dict[str, Choice]:
    groups: dict[Any, list[Layer]] = {}
    for layer in layers_of(graph.load(component.graph)):
        groups.setdefault((layer.input, layer.node.op_type, layer.shape[2:]), []).append(layer)
    choices: dict[str, Choice] = {}
    for layers in groups.values():
        choices |= _of_group(layers, seen, arithmetic)
    return choices


def _of_group(layers: Sequence[Layer], seen: Mapping[str, Seen], arithmetic: Arithmetic) -> dict[str, Choice]:
    """The choices of layers that read the same tensor, which have one scaling."""
    edges = seen[layers[0].weight]
    largest = np.maximum(edges.highest, -edges.lowest)
    plain = _with(layers, seen, None, arithmetic)
    best, gain = plain, 0.0
    for exponent in EXPONENTS:
        other = _with(layers, seen, _factors(layers, largest, exponent), arithmetic)
        gained = _db(_total(other)) - _db(_total(plain))
        if gained > gain:
            best, gain = other, gained
    free = norm_before(layers[0].input, [layer.node for layer in layers]) is not None
    if gain < (WORTH_NOTHING if free else WORTH_A_PRODUCT):
        best = plain
    return {name: replace(choice, products=seen[name].products) for name, choice in best.items()}


def _total(choices: Mapping[str, Choice]) -> float:
    return sum(choice.error for choice in choices.values())


def _factors(layers: Sequence[Layer], largest: Float32, exponent: float) -> Float32:
    """Factors of the input's channels (Xiao et al. 2022, eq. 4), with 1 as their geometric mean."""
    axes = (0, 2, 3) if layers[0].is_conv else (1,)
    weights: Float32 = np.max([np.abs(layer.numbers).max(axes) for layer in layers], axis=0)
    least = np.float32(1e-5)
    factors: Array = np.maximum(largest, least) ** exponent / np.maximum(weights, least) ** (1 - exponent)
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)


def _with(
    layers: Sequence[Layer], seen: Mapping[str, Seen], factors: Float32 | None, arithmetic: Arithmetic
) -> dict[str, Choice]:
    """The choices with these factors. The scale covers all that was seen: errors of large values do most harm.

    The mean error comes from the rows, and the errors from those of the held-out prompt too, which may be larger.
    """
    edges = seen[layers[0].weight]
    divisor = np.float32(1) if factors is None else factors
    high, low = float((edges.highest / divisor).max()), float((edges.lowest / divisor).min())
    kind, largest = arithmetic.kind, arithmetic.largest_weight
    if arithmetic.unsigned and layers[0].is_conv and -low < MOSTLY_POSITIVE * high:
        scale = max(high - low, 1e-6) / 255
        zero = round(-low / scale)
    else:
        scale, zero = max(high, -low, 1e-6) / LARGEST[kind], 0
    choices: dict[str, Choice] = {}
    for layer in layers:
        weight = layer.numbers if factors is None else smoothed(layer.numbers, factors, layer.is_conv)
        short = rounded(weight, weight_scale(weight, layer.is_conv, largest), kind=kind)
        own = seen[layer.weight]
        rows = np.concatenate([*own.rows, *own.judging])
        if factors is not None:
            rows = rows / np.repeat(factors, rows.shape[1] // factors.size)
        exact = rows @ _matrix(weight)
        error = rounded(rows, scale, zero, kind) @ _matrix(short) - exact
        shift: Float32 | None = error[: sum(map(len, own.rows))].mean(0) if layer.bias is not None else None
        noise = float(np.square(error if shift is None else error - shift).mean())
        power = float(np.square(exact).mean())
        scaling = Scaling(scale, factors, zero, shift, kind, largest)
        choices[layer.weight] = Choice(scaling, noise, noise / max(power, 1e-30))
    return choices


def _matrix(weight: Float32) -> Float32:
    """A weight as [numbers of an output, outputs]."""
    if weight.ndim == 2:
        return weight
    matrix: Any = weight.reshape(len(weight), -1)  # NumPy's types lose its shape here
    return matrix.T
