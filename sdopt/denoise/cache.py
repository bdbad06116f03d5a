"""The UNets of a feature cache: a full call keeps its deep features, and the shallow calls after it take them.

    full      prediction, deep = unet_deep(sample, timestep, ...)
    shallow   prediction       = unet_shallow(sample, timestep, ..., deep)

Ref: Ma et al. 2023, arXiv:2312.00858; `sdopt.build.shallow` cuts the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdopt.bundle.joined import DEEP, SHALLOW, cached_engine
from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.denoise.conditions import Call
from sdopt.denoise.control import Model, Network
from sdopt.engine import Engine

Keep = Callable[[Float32], None]  # takes the deep features of one call of a UNet


@dataclass(frozen=True)
class Cached:
    """What a call does with deep features of this depth: it takes them or, if it is a full one, gives them."""

    depth: int
    takes: bool

    def engine(self, unet: str) -> str:
        """The engine that does it in place of `unet`."""
        return cached_engine(unet, SHALLOW if self.takes else DEEP, self.depth)


def full(engine: Engine, keep: Keep) -> Network:
    """The full UNet, whose deep features are kept."""

    def network(sample: Float32, timestep: Float32, inputs: Mapping[str, Array]) -> Float32:
        outputs = engine(sample=sample, timestep=timestep, **inputs)
        keep(outputs[DEEP])
        return outputs["noise_pred"]

    return network


def shallow(engine: Engine) -> Network:
    """The shallow UNet, which may not read all inputs of the full one."""
    names = {spec.name for spec in engine.inputs}

    def network(sample: Float32, timestep: Float32, inputs: Mapping[str, Array]) -> Float32:
        own = {name: array for name, array in inputs.items() if name in names}
        return engine(sample=sample, timestep=timestep, **own)["noise_pred"]

    return network


def with_deep(model: Model, in_one: bool) -> Model:
    """The model of a shallow UNet: each half of guidance has its own deep features. `in_one`: one call has both."""

    def wrapped(sample: Float32, call: Call) -> Float32:
        deep = call.deep
        assert deep is not None  # a program begins with a full call
        both = {DEEP: deep.reshape(-1, *deep.shape[2:])} if in_one else None
        conditions = call.conditions.beside({DEEP: deep[-1]}, {DEEP: deep[0]}, both)
        return model(sample, replace(call, conditions=conditions))

    return wrapped


def halves(kept: Sequence[Float32], images: int) -> Float32:
    """What the calls of a UNet gave for so many images, as [halves of guidance, images, channels, h, w]."""
    rows = np.concatenate(kept)
    return rows.reshape(-1, images, *rows.shape[1:])
