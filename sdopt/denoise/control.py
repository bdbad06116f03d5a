"""ControlNets and T2I-Adapters around the UNet: what they give are further inputs of `unet_controlled`.

Ref: Zhang et al. 2023, arXiv:2302.05543; Zhao et al. 2023, arXiv:2305.16322, for several at once; Mou et al. 2023,
arXiv:2302.08453.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from sdopt.bundle.adapter import CONTROLNET, adapter_component
from sdopt.bundle.joined import FEATURE, PICTURE
from sdopt.bundle.specs import Array, Float32, TensorSpec
from sdopt.dataclass import dataclass
from sdopt.denoise.conditions import Call
from sdopt.engine import Engine

Model = Callable[[Float32, Call], Float32]  # the prediction for a sample
Network = Callable[[Float32, Float32, Mapping[str, Array]], Float32]  # sample, timestep, its further inputs
Residuals = dict[str, Float32]


@dataclass(frozen=True)
class Control:
    """What steers a call: ControlNets that run, and T2I-Adapters whose features are added.

    `guess`: only the conditional half of guidance gets the residuals.
    """

    nets: tuple[str, ...]
    guess: bool = False
    features: tuple[str, ...] = ()


def net_engine(name: str) -> str:
    """The engine of a ControlNet, as the pool calls it."""
    return adapter_component(name, CONTROLNET)


def controlled(
    model: Model, unet: Engine, nets: Mapping[str, Engine], how: Control, guided: bool, together: bool
) -> Model:
    """The model of a controlled UNet: the residuals of all nets are added up, and none is zeros.

    `guided`, `together`: see `Predict`. Each net sees the sample that the UNet sees, without the further channels of
    an inpainting UNet. With guidance, a net runs on both halves in one call if the UNet does. Features are those of
    the conditions, for both halves.
    """
    inputs = [spec for spec in unet.inputs if "residual" in spec.name]
    inside = [spec for spec in unet.inputs if "feature" in spec.name]

    def wrapped(sample: Float32, call: Call) -> Float32:
        told = call.conditions
        if not nets:
            zeros = nothing(inputs, len(sample))
            beside = told.beside(zeros, zeros, nothing(inputs, 2 * len(sample)) if guided and together else None)
        elif not guided:
            beside = told.beside(_sum(nets, sample, call, told.cond, 1), None, None)
        elif how.guess:
            cond = _sum(nets, sample, call, told.cond, 1)
            beside = told.beside(cond, {name: np.zeros_like(array) for name, array in cond.items()}, None)
        elif together:
            both = _sum(nets, sample, call, told.both, 2)
            halves = {name: np.split(array, 2) for name, array in both.items()}
            negative, cond = ({name: pair[i] for name, pair in halves.items()} for i in (0, 1))
            beside = told.beside(cond, negative, both)
        else:
            assert told.negative is not None  # only a guided call has two halves
            negative = _sum(nets, sample, call, told.negative, 1)
            beside = told.beside(_sum(nets, sample, call, told.cond, 1), negative, None)
        features = {**nothing(inside, len(sample)), **(told.features if how.features else {})}
        both = {spec.name: _of_both(spec, features[spec.name]) for spec in inside} if guided and together else None
        return model(sample, replace(call, conditions=beside.beside(features, features, both)))

    return wrapped


def _of_both(spec: TensorSpec, feature: Float32) -> Float32:
    """The input of a call with both halves of guidance; its batch may be that of the images."""
    return feature if spec.shape[0] == "images" else np.concatenate([feature, feature])


def nothing(inputs: list[TensorSpec], images: int) -> Residuals:
    """Residuals that change nothing: zeros of one pixel, which is added everywhere."""
    return {spec.name: np.zeros((images, *_channels(spec), 1, 1), np.float32) for spec in inputs}


def _channels(spec: TensorSpec) -> tuple[int]:
    assert isinstance(spec.shape[1], int)
    return (spec.shape[1],)


def _sum(
    nets: Mapping[str, Engine], sample: Float32, call: Call, inputs: Mapping[str, Array], halves: int
) -> Residuals:
    """The residuals of all nets, added up; `inputs` are those of so many halves of guidance."""
    total: Residuals = {}
    for name, net in nets.items():
        seen = call.conditions.pictures[name]
        of_images: dict[str, Array] = {"sample": sample, "timestep": call.timestep, PICTURE: seen, FEATURE: seen}
        of_images |= call.controls[name]
        given = net(**{spec.name: _of_halves(spec, of_images, halves, inputs) for spec in net.inputs})
        total = {key: total[key] + array if total else array for key, array in given.items()}
    return total


def _of_halves(spec: TensorSpec, of_images: Mapping[str, Array], halves: int, inputs: Mapping[str, Array]) -> Array:
    """An input of a net for so many halves of guidance.

    `of_images`: those that are the same for all halves; `inputs`: the others, of all halves already.
    """
    if spec.name not in of_images:
        return inputs[spec.name]
    array = of_images[spec.name]
    return array if halves == 1 or spec.shape[0] == "images" else np.concatenate([array] * halves)
