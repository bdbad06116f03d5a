"""The UNet of Stable Diffusion and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from sdopt.bundle.adapter import CONTROLLED
from sdopt.bundle.format import Conditioning
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export.blocks import image_prompt
from sdopt.export.blocks.vae import LATENT, LATENT_SIZES
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.part import Part, Sizes, Variant
from sdopt.graph import control

NUMBERS = {"aesthetic_score": 1}  # how many numbers an argument adds to `time_ids`; the others are pairs
STEERED = {"CrossAttnDownBlock2D", "DownBlock2D"}  # blocks inside of which diffusers adds what adapters give


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


class ControlledUNet(torch.nn.Module):
    """The same, with what a ControlNet and a T2I-Adapter add inside of it: see `sdopt.graph.control`."""

    def __init__(self, model: Any, residuals: Sequence[str], features: Sequence[str]) -> None:
        super().__init__()
        self.model, self.residuals, self.features = model, residuals, features

    def forward(self, **tensors: torch.Tensor) -> torch.Tensor:
        *down, mid = (tensors.pop(name) for name in self.residuals)
        inside = [tensors.pop(name) for name in self.features]
        sample, timestep, text = (tensors.pop(name) for name in ("sample", "timestep", "encoder_hidden_states"))
        return self.model(
            sample,
            timestep,
            text,
            timestep_cond=tensors.pop("timestep_cond", None),
            added_cond_kwargs=tensors,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            down_intrablock_additional_residuals=inside,
            return_dict=False,
        )[0]


def part(checkpoint: Checkpoint, conditioning: Conditioning) -> Part:
    """The UNet, with the inputs that its conditioning needs, and its variants for ControlNets and image prompts."""
    plain = _part(checkpoint, conditioning, checkpoint.load("unet"))
    model = cast(Any, plain.module).model
    if {type(block).__name__ for block in model.down_blocks} - STEERED:
        return plain
    controlled = _controlled(plain)
    return replace(plain, variants=(controlled, *image_prompt.variants(controlled.part, _feature_places(model))))


def _controlled(plain: Part) -> Variant:
    """The variant of a UNet that takes what a ControlNet and a T2I-Adapter give."""
    model = cast(Any, plain.module).model
    specs, sizes = residuals(model, plain.sizes)
    places = _feature_places(model)
    features = tuple(
        control.feature(name, cast(int, specs[place].shape[1]))
        for name, place in zip(control.feature_names(places, len(specs) - 1), places, strict=True)
    )
    names = [spec.name for spec in features]
    lengths = [
        control.residual_sizes(names, [[one[str(side)] for side in specs[place].shape[2:]] for place in places])
        for one in sizes
    ]
    return Variant(
        replace(
            plain,
            name=CONTROLLED,
            module=ControlledUNet(model, [spec.name for spec in specs], names),
            inputs=(*plain.inputs, *specs, *features),
            sizes=tuple({**own, **more} for own, more in zip(sizes, lengths, strict=True)),
            shared=(*plain.shared, *names),
        ),
        partial(control.write_controlled_graph, places=places),
    )


def _feature_places(model: Any) -> list[int]:
    """To which of the things that have residuals each feature is added: to one in each block, and to the middle.

    In a block with cross-attention it is the last layer, in another one all that the block gives.
    Ref: diffusers, UNet2DConditionModel.forward, down_intrablock_additional_residuals
    """
    places: list[int] = []
    last = 0  # the first convolution
    for block in model.down_blocks:
        layer = last + len(block.resnets)
        last = layer + (1 if block.downsamplers else 0)
        places.append(layer if getattr(block, "has_cross_attention", False) else last)
    return places if model.mid_block is None else [*places, last + 1]


def residuals(model: Any, sizes: Sequence[Sizes]) -> tuple[tuple[TensorSpec, ...], tuple[Sizes, ...]]:
    """What a ControlNet gives to a UNet, and these sizes with those of all residuals.

    `model`: one of the two; both have the same downward path.
    """
    of_sizes = [_skips(model, one["latent_height"], one["latent_width"]) for one in sizes]
    names = control.residual_names(len(of_sizes[0]) - 1)
    specs = tuple(control.residual(name, skip[0]) for name, skip in zip(names, of_sizes[0], strict=True))
    named = [control.residual_sizes(names, [skip[1:] for skip in skips]) for skips in of_sizes]
    return specs, tuple({**own, **more} for own, more in zip(sizes, named, strict=True))


def require_supported(checkpoint: Checkpoint, conditioning: Conditioning) -> None:
    """Check by the configurations alone that this UNet can be exported.

    It is run without weights at the sizes of the trace, which no power of two divides.
    Raises: CheckpointError that says what it takes that is not exported.
    """
    config = checkpoint.config("unet")
    _refuse_unsupported(checkpoint, conditioning, config)
    part = _part(checkpoint, conditioning, checkpoint.skeleton("unet"))
    inputs = {name: torch.from_numpy(array).to("meta") for name, array in part.example(part.sizes[0]).items()}
    try:
        with torch.inference_mode():
            part.module(**inputs)
    except Exception as error:  # a configuration can make diffusers raise anything
        sizes = " x ".join(str(part.sizes[0][name]) for name in LATENT)
        raise CheckpointError(
            f"{checkpoint.folder / 'unet'}: as config.json describes it, this UNet does not take latents of every size "
            f"({sizes}) or needs other inputs; such models are not exported. diffusers says: {error}"
        ) from error


def _part(checkpoint: Checkpoint, conditioning: Conditioning, model: torch.nn.Module) -> Part:
    config = checkpoint.config("unet")
    tokens = checkpoint.config(conditioning.encoders[0].component)["max_position_embeddings"]
    return Part(
        name="unet",
        module=UNet(model),
        inputs=(
            TensorSpec("sample", "float32", ("images", config["in_channels"], *LATENT)),
            TensorSpec("timestep", "float32", ("images",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", _text_width(config))),
            *_further_inputs(checkpoint, conditioning),
        ),
        outputs=(TensorSpec("noise_pred", "float32", ("batch", config["out_channels"], *LATENT)),),
        sizes=guided_sizes(tokens),
        shared=("sample", "timestep"),
    )


def guided_sizes(tokens: int) -> tuple[Sizes, ...]:
    """The sizes of the trace and of the checks of a model that takes both halves of guidance in one call."""
    trace, small, guided = LATENT_SIZES
    return (
        {**trace, "images": 2, "tokens": tokens},
        {**small, "images": 1, "tokens": tokens},
        {**guided, "images": 2, "batch": 4, "tokens": 2 * tokens},
    )


def _skips(model: Any, height: int, width: int) -> list[tuple[int, int, int]]:
    """Channels, height and width of all that the downward path gives to the upward path, and of what the middle gives.

    `height`, `width`: those of the sample.
    """
    skips: list[tuple[int, int, int]] = [(int(model.conv_in.out_channels), height, width)]
    for block in model.down_blocks:
        skips += [(int(resnet.out_channels), height, width) for resnet in block.resnets]
        if block.downsamplers:
            rounds_up = block.downsamplers[0].padding > 0  # of a convolution of 3x3 in steps of 2
            height, width = ((side + rounds_up) // 2 for side in (height, width))
            skips.append((skips[-1][0], height, width))
    return [*skips, skips[-1]]


def _further_inputs(checkpoint: Checkpoint, conditioning: Conditioning) -> tuple[TensorSpec, ...]:
    """What the UNet takes beside sample, timestep and text: pooled text and sizes (SDXL), the guidance scale (LCM)."""
    widths: dict[str, int] = {}
    if conditioning.pooling:
        widths["text_embeds"] = checkpoint.config(conditioning.pooling[0])["projection_dim"]
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


def _refuse_unsupported(checkpoint: Checkpoint, conditioning: Conditioning, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError that names the key of a UNet that takes what neither its pipeline nor a request gives."""
    blocks = [*config["down_block_types"], config.get("mid_block_type"), *config["up_block_types"]]
    channels: int = checkpoint.config("vae")["latent_channels"]
    text = sum(checkpoint.config(encoder.component)["hidden_size"] for encoder in conditioning.encoders)
    embedding = "text_time" if conditioning.pooled else None
    refused = {
        "class_embed_type": (config.get("class_embed_type"), "it takes class labels, which no request has"),
        "num_class_embeds": (config.get("num_class_embeds"), "it takes class labels, which no request has"),
        "class_embeddings_concat": (
            config.get("class_embeddings_concat"),
            "it takes class labels, which no request has",
        ),
        "dual_cross_attention": (config.get("dual_cross_attention"), "it takes two texts, which no request has"),
        "encoder_hid_dim_type": (
            config.get("encoder_hid_dim_type") not in (None, "text_proj"),
            "it takes pictures beside the text, which are not exported",
        ),
        "addition_embed_type": (
            config.get("addition_embed_type") != embedding,
            f"its pipeline class gives conditions for {embedding!r}; further conditions are not exported",
        ),
        "attention_type": (
            config.get("attention_type", "default") != "default",
            "it takes boxes beside the text, which are not exported",
        ),
        "down_block_types": (
            not any("CrossAttn" in str(block) for block in blocks),
            "it has no cross-attention, so it takes no text",
        ),
        "in_channels": (
            config["in_channels"] not in (channels, 2 * channels + 1),
            f"its pipeline class gives {channels} channels of latents or, with a mask, {2 * channels + 1}",
        ),
        "out_channels": (config["out_channels"] != channels, f"the latents of the VAE have {channels} channels"),
        "cross_attention_dim": (_text_width(config) != text, f"its text encoders give {text} features"),
    }
    for key, (is_so, reason) in refused.items():
        if is_so:
            raise CheckpointError(f"{checkpoint.folder / 'unet'}: {key} is {config.get(key)!r}: {reason}")


def _text_width(config: Mapping[str, Any]) -> int:
    """The features of the text that the UNet takes; 0 if its blocks take unlike ones."""
    if config.get("encoder_hid_dim"):  # it projects the text itself
        return int(config["encoder_hid_dim"])
    width = config["cross_attention_dim"]
    if not isinstance(width, (list, tuple)):
        return width
    of_blocks = cast("Sequence[int]", width)
    return of_blocks[0] if len(set(of_blocks)) == 1 else 0
