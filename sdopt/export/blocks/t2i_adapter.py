"""T2I-Adapter: a small network that sees a picture alone. Its features are added in the UNet's downward path.

Ref: Mou et al. 2023, arXiv:2302.08453.
"""

from __future__ import annotations

from typing import Any

import torch

from sdopt.bundle.adapter import CONTROLLED, T2I_ADAPTER, Features
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import BundleError, CheckpointError
from sdopt.export.blocks.vae import LATENT
from sdopt.export.checkpoint import MODEL, Checkpoint
from sdopt.export.part import Part

PICTURE = "control_image"
LATENTS = 16  # a side; one of the sizes at which every UNet was compared with its checkpoint
PICTURES = ((2, 3, 5), (1, 4, 6), (3, 5, 4))  # of the trace and of the checks: how many, and their sides in cells


class Adapter(torch.nn.Module):
    """A picture in 0..1 to its features, one for each block of the UNet's downward path."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, control_image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model(control_image))


def part(checkpoint: Checkpoint, bundle: Bundle) -> Part:
    """The adapter, ready to be traced; its outputs have the names of the inputs of the bundle's UNet.

    Raises: CheckpointError if it is made for another model; BundleError for a bundle whose UNet takes no features.
    """
    model: Any = checkpoint.load(MODEL)
    takes = [spec for spec in bundle.component(CONTROLLED).inputs if "feature" in spec.name]
    if not takes:
        raise BundleError(
            f"{bundle.path} takes no T2I-Adapter: an earlier sdopt has written it. Export it again: "
            f"`sdopt export CHECKPOINT -o {bundle.path} --force`"
        )
    multiple, channels = int(model.downscale_factor), checkpoint.config(MODEL)["in_channels"]
    if channels not in (1, 3):
        raise CheckpointError(
            f"{checkpoint.folder}: in_channels is {channels!r}: it sees pictures of {channels} channels, and pictures "
            "have 1 or 3"
        )
    gives = _shapes(model, channels, LATENTS * bundle.factor)
    _refuse_other_model(str(checkpoint.folder), bundle, takes, gives)
    return Part(
        name=T2I_ADAPTER,
        module=Adapter(model),
        inputs=(TensorSpec(PICTURE, "float32", ("images", channels, "height", "width")),),
        outputs=tuple(takes[: len(gives)]),
        sizes=tuple({"images": n, "height": h * multiple, "width": w * multiple} for n, h, w in PICTURES),
    )


def described(checkpoint: Checkpoint) -> dict[str, Features]:
    """Its own fields of the manifest."""
    return {"features": Features(int(checkpoint.config(MODEL)["downscale_factor"]))}


def _shapes(model: Any, channels: int, pixels: int) -> list[tuple[int, ...]]:
    """The shapes of its features of a square picture of so many pixels a side; none where it takes no such picture."""
    if pixels % model.downscale_factor:
        return []
    with torch.inference_mode():
        return [tuple(feature.shape) for feature in model(torch.zeros(1, channels, pixels, pixels))]


def _refuse_other_model(where: str, bundle: Bundle, takes: list[TensorSpec], gives: list[tuple[int, ...]]) -> None:
    """Raises: CheckpointError unless the bundle's UNet takes features of these shapes. `gives`: see `LATENTS`.

    The heights are compared where the bundle's own parity gate has run with latents of this size.
    """
    measured = [one.sizes for one in bundle.manifest.components[CONTROLLED].parity if one.sizes[LATENT[0]] == LATENTS]
    heights = [measured[0][str(spec.shape[2])] for spec in takes] if measured else [shape[2] for shape in gives]
    wanted = [(spec.shape[1], height) for spec, height in zip(takes, heights, strict=False)]
    given = [(shape[1], shape[2]) for shape in gives]
    if not given or given != wanted[: len(given)]:
        raise CheckpointError(
            f"{where}: of {LATENTS} latents a side, its features have (channels, height) {given or 'that do not exist'}"
            f", and the UNet of {bundle.path} takes {wanted}; it is made for another model"
        )
