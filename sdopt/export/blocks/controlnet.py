"""ControlNet: a trained copy of the UNet's downward path, which sees a picture. Its residuals are added in the UNet.

Ref: Zhang et al. 2023, arXiv:2302.05543.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from sdopt.bundle.adapter import CONTROLLED, CONTROLNET, Control
from sdopt.bundle.files import Bundle
from sdopt.bundle.joined import PICTURE, SCALE
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export.blocks.unet import guided_sizes, residuals
from sdopt.export.blocks.vae import LATENT
from sdopt.export.checkpoint import MODEL, Checkpoint
from sdopt.export.part import Part

FURTHER = ("text_embeds", "time_ids")  # inputs of SDXL's UNet that its ControlNets take too


class ControlNet(torch.nn.Module):
    """The noisy sample, its timestep, the text and the picture to residuals, each times its own scale."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        control_image: torch.Tensor,
        conditioning_scale: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        down, mid = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            control_image,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )
        scales = conditioning_scale[:, :, None, None, None].unbind(1)
        return tuple(residual * scale for residual, scale in zip((*down, mid), scales, strict=True))


def part(checkpoint: Checkpoint, bundle: Bundle) -> Part:
    """The ControlNet, ready to be traced with the inputs that the bundle's UNet has.

    Raises: CheckpointError if it is made for another model, or takes what no request has.
    """
    config, where = checkpoint.config(MODEL), str(checkpoint.folder)
    refuse_unsupported(where, config, bundle)
    model: Any = checkpoint.load(MODEL)
    given = {spec.name: spec for spec in bundle.component("unet").inputs}
    tokens, factor = max(entry.max_length for entry in bundle.manifest.tokenizers.values()), bundle.factor
    pictured = [
        {**one, "height": factor * one["latent_height"], "width": factor * one["latent_width"]}
        for one in guided_sizes(tokens)
    ]
    outputs, sizes = residuals(model, pictured)
    refuse_other_model(where, outputs, bundle)
    further = tuple(given[name] for name in FURTHER if name in given and config["addition_embed_type"])
    return Part(
        name=CONTROLNET,
        module=ControlNet(model),
        inputs=(
            TensorSpec("sample", "float32", ("images", config["in_channels"], *LATENT)),
            given["timestep"],
            given["encoder_hidden_states"],
            TensorSpec(PICTURE, "float32", ("images", config["conditioning_channels"], "height", "width")),
            TensorSpec(SCALE, "float32", ("batch", len(outputs))),
            *further,
        ),
        outputs=outputs,
        sizes=sizes,
        shared=("sample", "timestep", PICTURE),
    )


def described(checkpoint: Checkpoint) -> dict[str, Control]:
    """Its own fields of the manifest."""
    return {"control": Control(pooled=bool(checkpoint.config(MODEL)["global_pool_conditions"]))}


def refuse_unsupported(where: str, config: Mapping[str, Any], bundle: Bundle) -> None:
    """Raises: CheckpointError that names the key."""
    given = {spec.name: spec for spec in bundle.component("unet").inputs}
    width, latents = given["encoder_hidden_states"].shape[2], bundle.manifest.latents
    steps = 2 ** (len(cast("Sequence[int]", config["conditioning_embedding_out_channels"])) - 1)
    takes = "text_time" if "text_embeds" in given else None
    refused = {
        "cross_attention_dim": (config["cross_attention_dim"] != width, f"the bundle's text has {width} features"),
        "in_channels": (config["in_channels"] != latents.channels, f"the bundle's latents have {latents.channels}"),
        "conditioning_embedding_out_channels": (
            steps != latents.factor,
            f"it makes its picture {steps} times smaller, and the bundle's latents are {latents.factor} times smaller",
        ),
        "addition_embed_type": (
            config.get("addition_embed_type") != takes,
            f"the bundle's UNet is given conditions for {takes!r}",
        ),
        "class_embed_type": (config.get("class_embed_type"), "it takes class labels, which no request has"),
        "num_class_embeds": (config.get("num_class_embeds"), "it takes class labels, which no request has"),
        "encoder_hid_dim_type": (config.get("encoder_hid_dim_type"), "it projects the text, which is not exported"),
    }
    for key, (is_so, reason) in refused.items():
        if is_so:
            raise CheckpointError(f"{where}: {key} is {config.get(key)!r}: {reason}; it is made for another model")


def refuse_other_model(where: str, outputs: Sequence[TensorSpec], bundle: Bundle) -> None:
    """Raises: CheckpointError unless the bundle's UNet takes these residuals."""
    takes = {spec.name: spec.shape[1] for spec in bundle.component(CONTROLLED).inputs if "residual" in spec.name}
    gives = {spec.name: spec.shape[1] for spec in outputs}
    if takes != gives:
        raise CheckpointError(
            f"{where}: its residuals have {list(gives.values())} channels, and the UNet of {bundle.path} takes "
            f"{list(takes.values())}; it is made for another model"
        )
