"""The seam between the loop and the network: prediction = model(sample, call). Wrappers compose.

    model = guided(unet(engine))                 the UNet with and without the prompt, and what is made of the two
    model = joined(model)                        further channels beside the sample: an inpainting UNet
    prediction = model(sample, call)             one row for each image; rows may be of different requests

`Predict` is the choice of wrappers as data: a call of the loop has one, and calls with equal ones may share a batch.
Ref: Ho & Salimans 2022, arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sdopt.bundle.adapter import CONTROLLED, IMAGE_PROMPTED
from sdopt.bundle.format import UNET
from sdopt.bundle.specs import Array, Float32, Scalar
from sdopt.dataclass import dataclass
from sdopt.denoise.cache import Cached, Keep, full, shallow, with_deep
from sdopt.denoise.conditions import Call
from sdopt.denoise.control import Control, Model, Network, controlled, net_engine
from sdopt.engine import Engine


@dataclass(frozen=True)
class Predict:
    """How a call asks the UNet: with guidance or with the prompt alone, and what else is wrapped around it.

    `together`: both halves of guidance are one call of the UNet, else two. `rescale`: see `rescaled`. `embedding`: the
    width of the guidance scale as an input of the denoiser, 0 without it. `joins`: further channels beside the sample.
    `control`: how ControlNets are used, if they are. `pictured`: the UNet takes image prompts. `cached`: what it does
    with deep features, if a feature cache is in use. `denoiser`: the component that predicts.
    """

    guided: bool
    together: bool = True
    rescale: float = 0.0
    embedding: int = 0
    joins: bool = False
    control: Control | None = None
    pictured: bool = False
    cached: Cached | None = None
    denoiser: str = UNET

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that it calls, the UNet's first."""
        if self.cached is not None:
            return (self.cached.engine("unet"),)
        nets = () if self.control is None else tuple(map(net_engine, self.control.nets))
        if self.pictured:
            return (IMAGE_PROMPTED, *nets)
        return (self.denoiser,) if self.control is None else (CONTROLLED, *nets)

    def model(self, engines: Mapping[str, Engine], keep: Keep = lambda deep: None) -> Model:
        """The UNet in its wrappers. `keep`: takes the deep features of a full call, those of each half in turn."""
        engine = engines[self.engines[0]]
        network = self._network(engine, keep)
        if not self.guided:
            model = conditional(network)
        elif self.together:
            model = guided(network, repeats_inside(engine), self.rescale)
        else:
            model = guided_in_two(network, self.rescale)
        if self.embedding:
            model = told_scale(model, self.embedding)
        if self.cached is not None and self.cached.takes:
            model = with_deep(model, self.guided and self.together)
        if self.joins:
            model = joined(model)
        if self.control is None and not self.pictured:
            return model
        control = self.control or Control(())
        nets = {name: engines[net_engine(name)] for name in control.nets}
        return controlled(model, engine, nets, control, self.guided, self.together)

    def _network(self, engine: Engine, keep: Keep) -> Network:
        if self.cached is None:
            return unet(engine)
        return shallow(engine) if self.cached.takes else full(engine, keep)


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


def told_scale(model: Model, width: int) -> Model:
    """A denoiser that was distilled with guidance: it takes the scale as a vector, in both halves if there are two."""

    def wrapped(sample: Float32, call: Call) -> Float32:
        rows = {"timestep_cond": np.stack([scale_embedding(scale - 1, width) for scale in call.told])}
        both = None if call.conditions.negative is None else {name: np.concatenate([a, a]) for name, a in rows.items()}
        return model(sample, replace(call, conditions=call.conditions.beside(rows, rows, both)))

    return wrapped


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

    Of width 1 it is the scale itself, w + 1, for a denoiser that embeds it inside.
    In float32 throughout, where diffusers is: the angles reach thousands.
    Ref: Meng et al. 2023, arXiv:2210.03142; Luo et al. 2023, arXiv:2310.04378, section 4.2.
    """
    if width == 1:
        return np.array([w + 1], np.float32)
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
