"""The seam between the loop and the network: prediction = model(sample, call). Wrappers compose.

    model = guided(unet(engine))                 the UNet with and without the prompt, and what is made of the two
    model = joined(model)                        further channels beside the sample: an inpainting UNet
    prediction = model(sample, call)             one row for each image; rows may be of different requests

`Predict` is the choice of wrappers as data: a call of the loop has one, and calls with equal ones may share a batch.
Ref: Ho & Salimans 2022, arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sdopt.bundle.specs import Array, Float32, Scalar
from sdopt.engine import Engine


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the UNet is given beside the sample and the timestep.

    `cond` and `negative` are its further inputs by name, with the prompt and without; `extra` [images, n, h, w] is
    joined to the sample as further channels.
    """

    cond: Mapping[str, Float32]
    negative: Mapping[str, Float32] | None = None
    extra: Float32 | None = None

    @cached_property
    def both(self) -> Mapping[str, Float32]:
        """The inputs of both halves of guidance in one call: first without the prompt, then with it."""
        assert self.negative is not None  # only a guided call asks for it
        return {name: np.concatenate([self.negative[name], array]) for name, array in self.cond.items()}

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
        )


def _stacked(parts: Sequence[Mapping[str, Float32]]) -> dict[str, Float32]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of the model is told of every image: its timestep, its guidance scale, its conditions."""

    timestep: Float32  # [images]
    scales: tuple[float, ...]  # [images]
    conditions: Conditions

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
        return Call(np.concatenate([part.timestep for part in parts]), scales, conditions)


Network = Callable[[Float32, Float32, Mapping[str, Array]], Float32]  # sample, timestep, its further inputs
Model = Callable[[Float32, Call], Float32]  # the prediction for a sample


@dataclass(frozen=True)
class Predict:
    """How a call asks the UNet: with guidance or with the prompt alone, and what else is wrapped around it.

    `together`: both halves of guidance are one call of the UNet, else two. `rescale`: see `rescaled`. `embedding`: the
    width of the guidance scale as an input of the UNet, 0 without it. `joins`: further channels beside the sample.
    """

    guided: bool
    together: bool = True
    rescale: float = 0.0
    embedding: int = 0
    joins: bool = False

    def model(self, engine: Engine) -> Model:
        """The UNet in its wrappers."""
        network = unet(engine)
        if self.embedding:
            model = told_scale(network, self.embedding)
        elif not self.guided:
            model = conditional(network)
        elif self.together:
            model = guided(network, repeats_inside(engine), self.rescale)
        else:
            model = guided_in_two(network, self.rescale)
        return joined(model) if self.joins else model


def unet(engine: Engine) -> Network:
    """The UNet alone."""

    def network(sample: Float32, timestep: Float32, inputs: Mapping[str, Array]) -> Float32:
        return engine(sample=sample, timestep=timestep, **inputs)["noise_pred"]

    return network


def repeats_inside(engine: Engine) -> bool:
    """Whether the graph itself repeats the sample for both halves of guidance (see `sdopt.export.guidance_prefix`)."""
    inputs = engine.inputs
    return bool(inputs) and inputs[0].shape[0] == "images"


def conditional(network: Network) -> Model:
    """The prediction with the prompt alone."""

    def model(sample: Float32, call: Call) -> Float32:
        return network(sample, call.timestep, call.conditions.cond)

    return model


def guided(network: Network, repeats: bool = False, rescale: float = 0.0) -> Model:
    """Classifier-free guidance, both halves in one call; `repeats`: the network itself repeats the sample.

    Ref: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, in the form of Saharia et al. 2022, arXiv:2205.11487, section 2.2.
    """

    def model(sample: Float32, call: Call) -> Float32:
        both, times = sample, call.timestep
        if not repeats:
            both, times = np.concatenate([sample, sample]), np.concatenate([times, times])
        uncond, cond = np.split(network(both, times, call.conditions.both), 2)
        return pushed(uncond, cond, call.scale, rescale)

    return model


def guided_in_two(network: Network, rescale: float = 0.0) -> Model:
    """Classifier-free guidance in two calls: slower, and half of the memory."""

    def model(sample: Float32, call: Call) -> Float32:
        assert call.conditions.negative is not None  # only a guided call is asked for
        uncond = network(sample, call.timestep, call.conditions.negative)
        cond = network(sample, call.timestep, call.conditions.cond)
        return pushed(uncond, cond, call.scale, rescale)

    return model


def told_scale(network: Network, width: int) -> Model:
    """A UNet that was distilled with guidance: it takes the scale as a vector, and has no negative half."""

    def model(sample: Float32, call: Call) -> Float32:
        rows = np.stack([scale_embedding(scale - 1, width) for scale in call.scales])
        return network(sample, call.timestep, {**call.conditions.cond, "timestep_cond": rows})

    return model


def joined(model: Model) -> Model:
    """The model of an inpainting UNet, which takes the mask and the masked picture as further channels.

    Ref: Rombach et al. 2022, arXiv:2112.10752, section 4.5.
    """

    def wrapped(sample: Float32, call: Call) -> Float32:
        assert call.conditions.extra is not None  # such a bundle makes no picture without
        return model(np.concatenate([sample, call.conditions.extra], 1), call)

    return wrapped


def pushed(uncond: Float32, cond: Float32, scale: Scalar | Float32, rescale: float = 0.0) -> Float32:
    """uncond + scale * (cond - uncond), if asked for with the standard deviation of cond."""
    with np.errstate(invalid="ignore", over="ignore"):  # the loop names component and step of what is not finite
        prediction: Float32 = uncond + scale * (cond - uncond)
        return rescaled(prediction, cond, rescale) if rescale else prediction


def scale_embedding(w: float, width: int) -> Float32:
    """The guidance scale w as [width]: sines and cosines of 1000 w at falling frequencies, as timesteps are embedded.

    In float32 throughout, where diffusers is: the angles reach thousands.
    Ref: Meng et al. 2023, arXiv:2210.03142; Luo et al. 2023, arXiv:2310.04378, section 4.2.
    """
    half = width // 2
    step = np.log(np.float32(10000)) / np.float32(half - 1)
    frequencies: Float32 = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.full(half, w, np.float32)
    angles *= 1000
    angles *= frequencies
    row = np.zeros(width, np.float32)
    row[:half], row[half : 2 * half] = np.sin(angles), np.cos(angles)
    return row


def rescaled(prediction: Float32, cond: Float32, fraction: Scalar) -> Float32:
    """`prediction`, of which `fraction` is scaled to the standard deviation that the conditional output has.

    Ref: Lin et al. 2024, arXiv:2305.08891, section 3.4.
    """
    axes = tuple(range(1, cond.ndim))
    scale = cond.std(axes, keepdims=True, ddof=1) / prediction.std(axes, keepdims=True, ddof=1)
    return prediction * (fraction * scale + (1 - fraction))
