"""What the transformers of SD3 and Flux have in common: their inputs and outputs, and that they are checked by a run.

sample           [batch, channels, latent_height, latent_width], both in multiples of the patch
timestep         [batch] from 0 to 1000
text_embeds      [batch, features]: the pooled text
timestep_cond    [batch, 1]: the guidance scale, where the model was distilled with it
"""

from __future__ import annotations

import torch

from sdopt.bundle.format import TRANSFORMER, Conditioning, Latents
from sdopt.bundle.specs import TensorSpec
from sdopt.dataclass import dataclass
from sdopt.errors import CheckpointError
from sdopt.export.blocks import vae
from sdopt.export.blocks.vae import LATENT
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.file_weights import FileWeights
from sdopt.export.part import Part, Sizes

VAE = vae.VAE


@dataclass(frozen=True)
class Shape:
    """What a transformer takes: channels of a latent, features of the text and of the pooled text, and how many latents
    a token spans on a side. `guidance`: it takes the guidance scale.
    """

    channels: int
    text: int
    pooled: int
    patch: int
    guidance: bool = False


def part(module: torch.nn.Module, shape: Shape, weights: FileWeights | None = None) -> Part:
    """The part of a transformer behind its family's wrapper. `weights`: its numbers, if it has none."""
    further = (TensorSpec("timestep_cond", "float32", ("batch", 1)),) if shape.guidance else ()
    return Part(
        name=TRANSFORMER,
        module=module,
        inputs=(
            TensorSpec("sample", "float32", ("batch", shape.channels, *LATENT)),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", shape.text)),
            TensorSpec("text_embeds", "float32", ("batch", shape.pooled)),
            *further,
        ),
        outputs=(TensorSpec("noise_pred", "float32", ("batch", shape.channels, *LATENT)),),
        sizes=_sizes(shape.patch),
        weights=weights,
    )


def _sizes(patch: int) -> tuple[Sizes, ...]:
    """Those of the trace and of the checks: of odd numbers of tokens a side, wide and high."""
    sides = ((5, 7), (8, 3), (3, 4))
    batches, tokens = (2, 1, 3), (9, 5, 12)
    return tuple(
        {"batch": batch, "latent_height": patch * high, "latent_width": patch * wide, "tokens": length}
        for batch, (high, wide), length in zip(batches, sides, tokens, strict=True)
    )


def latents(checkpoint: Checkpoint, patch: int, most: int = 0) -> Latents:
    """How the VAE's latents become the transformer's: shifted, then scaled. `most`: see `Latents`.

    Raises: CheckpointError for numbers by which latents cannot be scaled.
    """
    own, config = vae.scaled_latents(checkpoint), checkpoint.config(VAE)
    shift = config.get("shift_factor")
    if isinstance(shift, bool) or not isinstance(shift, (int, float)):
        raise CheckpointError(f"{checkpoint.folder / VAE}: shift_factor is {shift!r}; it must be a number")
    return Latents(own.channels, own.factor, own.scaling_factor, float(shift), patch, most)


def require_run(checkpoint: Checkpoint, part: Part) -> None:
    """Check by the configuration alone that a transformer can be exported: it is run without weights.

    Raises: CheckpointError with what diffusers says.
    """
    inputs = {name: torch.from_numpy(array).to("meta") for name, array in part.example(part.sizes[0]).items()}
    try:
        with torch.inference_mode(), torch.device("meta"):
            part.module.to("meta")(**inputs)
    except Exception as error:  # a configuration can make diffusers raise anything
        raise CheckpointError(
            f"{checkpoint.folder / TRANSFORMER}: as config.json describes it, this transformer takes other inputs than "
            f"its pipeline class gives; such models are not exported. diffusers says: {error}"
        ) from error


def require_fit(checkpoint: Checkpoint, shape: Shape, conditioning: Conditioning, pooled: int, text: int) -> None:
    """Raises: CheckpointError unless a transformer takes what its VAE and its text encoders give.

    `pooled`: the features of the pooled text; `text`: those of T5, 0 without it.
    """
    channels: int = checkpoint.config(VAE)["latent_channels"]
    fits = {
        "in_channels": (shape.channels == channels, shape.channels, f"the latents of the VAE have {channels} channels"),
        "pooled_projection_dim": (shape.pooled == pooled, shape.pooled, f"its text encoders give {pooled} features"),
        "joint_attention_dim": (text in (0, shape.text), shape.text, f"T5 gives {text} features"),
    }
    for key, (fit, value, reason) in fits.items():
        if not fit:
            raise CheckpointError(f"{checkpoint.folder / TRANSFORMER}: {key} is for {value}: {reason}")
