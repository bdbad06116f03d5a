"""The UNet of Stable Diffusion and its relatives."""

from __future__ import annotations

from typing import Any

import torch

from sdopt.bundle.format import Conditioning
from sdopt.bundle.specs import TensorSpec
from sdopt.export.blocks.vae import LATENT, LATENT_SIZES
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.part import Part

NUMBERS = {"aesthetic_score": 1}  # how many numbers an argument adds to `time_ids`; the others are pairs


class UNet(torch.nn.Module):
    """A noisy sample, its timestep and the text to the prediction that the checkpoint was trained for.

    SDXL's takes the pooled text and sizes too, LCM's the guidance scale as an embedding.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]


def part(checkpoint: Checkpoint, conditioning: Conditioning) -> Part:
    """The UNet, with the inputs that its conditioning needs."""
    config = checkpoint.config("unet")
    tokens = checkpoint.config(conditioning.encoders[0].component)["max_position_embeddings"]
    trace, small, guided = LATENT_SIZES
    return Part(
        name="unet",
        module=UNet(checkpoint.load("unet")),
        inputs=(
            TensorSpec("sample", "float32", ("images", config["in_channels"], *LATENT)),
            TensorSpec("timestep", "float32", ("images",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", config["cross_attention_dim"])),
            *_further_inputs(checkpoint, conditioning),
        ),
        outputs=(TensorSpec("noise_pred", "float32", ("batch", config["out_channels"], *LATENT)),),
        sizes=(
            {**trace, "images": 2, "tokens": tokens},
            {**small, "images": 1, "tokens": tokens},
            {**guided, "images": 2, "batch": 4, "tokens": 2 * tokens},
        ),
        shared=("sample", "timestep"),
    )


def _further_inputs(checkpoint: Checkpoint, conditioning: Conditioning) -> tuple[TensorSpec, ...]:
    """What the UNet takes beside sample, timestep and text: pooled text and sizes (SDXL), the guidance scale (LCM)."""
    widths: dict[str, int] = {}
    if conditioning.pooled:
        widths["text_embeds"] = checkpoint.config(conditioning.pooled)["projection_dim"]
        widths["time_ids"] = sum(NUMBERS.get(argument, 2) for argument in conditioning.time_ids)
    if conditioning.guidance_embedding:
        widths["timestep_cond"] = conditioning.guidance_embedding
    return tuple(TensorSpec(name, "float32", ("batch", width)) for name, width in widths.items())


def guidance_embedding(checkpoint: Checkpoint) -> int:
    """The width of `timestep_cond`, the input by which a distilled UNet takes the guidance scale; 0 without it."""
    return checkpoint.config("unet").get("time_cond_proj_dim") or 0


def float16_attention_unsafe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The UNet, if its attention overflows in fp16: that of SD 2.1 does, and its configuration says so."""
    return ("unet",) if checkpoint.config("unet").get("upcast_attention") else ()
