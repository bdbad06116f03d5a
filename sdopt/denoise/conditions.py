"""What a call of the model is told: conditions that stay for the whole loop, and those of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property

import numpy as np

from sdopt.bundle.specs import Float32, Scalar
from sdopt.dataclass import dataclass


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the UNet is given beside the sample and the timestep.

    `cond` and `negative` are its further inputs by name, with the prompt and without; `extra` [images, n, h, w] is
    joined to the sample as further channels. `pictures` [images, channels, height, width] are what ControlNets see, by
    the name of each; a union ControlNet sees features [images, pictures, channels, h, w]. `features` [images, channels,
    h, w] are what T2I-Adapters made of their pictures, by the UNet's input.
    """

    cond: Mapping[str, Float32]
    negative: Mapping[str, Float32] | None = None
    extra: Float32 | None = None
    pictures: Mapping[str, Float32] = field(default_factory=dict[str, Float32])
    features: Mapping[str, Float32] = field(default_factory=dict[str, Float32])

    @cached_property
    def both(self) -> Mapping[str, Float32]:
        """The inputs of both halves of guidance in one call: first without the prompt, then with it."""
        assert self.negative is not None  # only a guided call asks for it
        return {name: np.concatenate([self.negative[name], array]) for name, array in self.cond.items()}

    def beside(
        self, cond: Mapping[str, Float32], negative: Mapping[str, Float32] | None, both: Mapping[str, Float32] | None
    ) -> Conditions:
        """These conditions and further inputs. `both`: these of both halves, where they are in one array already."""
        halves = None if self.negative is None else {**self.negative, **(negative or {})}
        made = Conditions({**self.cond, **cond}, halves, self.extra, self.pictures, self.features)
        if both is not None:
            vars(made)["both"] = {**self.both, **both}
        return made

    @staticmethod
    def stacked(parts: Sequence[Conditions]) -> Conditions:
        """The conditions of several requests as those of one."""
        if len(parts) == 1:
            return parts[0]
        negatives = [part.negative for part in parts if part.negative is not None]
        extras = [part.extra for part in parts if part.extra is not None]
        return Conditions(
            _stacked([part.cond for part in parts]),
            _stacked(negatives) if len(negatives) == len(parts) else None,
            np.concatenate(extras) if extras else None,
            _stacked([part.pictures for part in parts]),
            _stacked([part.features for part in parts]),
        )


def _stacked(parts: Sequence[Mapping[str, Float32]]) -> dict[str, Float32]:
    """What all parts have alike, stacked. Requests that share a call may differ in what they need in other calls."""
    common = [name for name in parts[0] if all(name in part for part in parts)]
    alike = [name for name in common if len({part[name].shape[1:] for part in parts}) == 1]
    return {name: np.concatenate([part[name] for part in parts]) for name in alike}


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of the model is told of every image: its timestep, its guidance scale, its conditions.

    `told`: the guidance scale of each image that the denoiser takes as an input; empty for one that takes none.
    """

    timestep: Float32  # [images]
    scales: tuple[float, ...]  # [images]
    conditions: Conditions
    # what ControlNets are told in this call, [images, width], by their names and those of their inputs
    controls: Mapping[str, Mapping[str, Float32]] = field(default_factory=dict[str, Mapping[str, Float32]])
    told: tuple[float, ...] = ()  # [images]
    deep: Float32 | None = None  # what a shallow call takes, [halves of guidance, images, channels, h, w]

    @cached_property
    def scale(self) -> Scalar | Float32:
        """The scale for arithmetic with the sample: a number, or [images, 1, 1, 1] where images differ."""
        if len(set(self.scales)) == 1:
            return self.scales[0]
        return np.array(self.scales, np.float32)[:, None, None, None]

    @staticmethod
    def stacked(parts: Sequence[Call], conditions: Conditions) -> Call:
        """Calls of several requests as one; `conditions` are theirs, stacked."""
        if len(parts) == 1:
            return parts[0]
        scales = tuple(scale for part in parts for scale in part.scales)
        nets = [net for net in parts[0].controls if all(net in part.controls for part in parts)]
        controls = {net: _stacked([part.controls[net] for part in parts]) for net in nets}
        deep = [part.deep for part in parts if part.deep is not None]
        told = tuple(scale for part in parts for scale in part.told)
        timesteps = np.concatenate([part.timestep for part in parts])
        return Call(timesteps, scales, conditions, controls, told, np.concatenate(deep, 1) if deep else None)
