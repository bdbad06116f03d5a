"""A union ControlNet: one net for several kinds of pictures, its modes, of which a request may give several at once.

    feature = scale * (condition + shift(scale * (mean of condition + task[mode])))     of each picture, before the loop
    sample  = conv_in(sample) + sum over pictures of kept * feature                     then as a ControlNet

`condition` is what the convolutions make of the picture; `shift` is a transformer and a projection to channels.
In diffusers this transformer sees the batch as its sequence. A picture's token then attends to the tokens of the same
picture for the other images of the batch, which are equal where all images have one picture; the sample's token
changes nothing. Here each image is computed alone, so that it is the same in every batch.
Ref: github.com/xinsir6/ControlNetPlus; diffusers, ControlNetUnionModel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sdopt.bundle.adapter import CONDITION, CONTROLNET, Control
from sdopt.bundle.files import Bundle
from sdopt.bundle.joined import FEATURE, KEPT, PICTURE, SCALE, TYPE
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export.blocks.controlnet import FURTHER, refuse_other_model, refuse_unsupported
from sdopt.export.blocks.unet import guided_sizes, residuals
from sdopt.export.blocks.vae import LATENT
from sdopt.export.checkpoint import MODEL, Checkpoint
from sdopt.export.part import Part

# the modes of the published nets, by how many they are: the first one has 6, ProMax 8
PUBLISHED = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "repaint")
OF_CONDITION = ("controlnet_cond_embedding.", "task_embedding", "transformer_layes.", "spatial_ch_projs.")
COUNTS = (2, 1, 3)  # of pictures: in the trace and in the checks


class Condition(torch.nn.Module):
    """A picture, its mode and its scale to the feature that is added to the net's sample."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.controlnet_cond_embedding = model.controlnet_cond_embedding
        self.task_embedding = model.task_embedding
        self.transformer_layes = model.transformer_layes
        self.spatial_ch_projs = model.spatial_ch_projs

    def forward(self, control_image: torch.Tensor, control_mode: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        condition = self.controlnet_cond_embedding(control_image)
        task = torch.nn.functional.embedding(control_mode, self.task_embedding)
        token = (condition.mean(dim=(2, 3)) + task) * scale
        for layer in self.transformer_layes:
            token = layer(token[None])[0]  # a sequence of one token
        shift = self.spatial_ch_projs(token)
        return (condition + shift[:, :, None, None]) * scale[:, :, None, None]


class Net(torch.nn.Module):
    """The noisy sample, its timestep, the text and the features of pictures to residuals, each times its own scale."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        control_feature: torch.Tensor,
        control_kept: torch.Tensor,
        control_type: torch.Tensor,
        conditioning_scale: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        feature = (control_feature * control_kept[:, :, None, None, None]).sum(1)

        def with_feature(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
            return output + feature

        hook = self.model.conv_in.register_forward_hook(with_feature)
        try:
            down, mid = self.model(
                sample,
                timestep,
                encoder_hidden_states,
                controlnet_cond=[],  # the features come by the hook
                control_type=control_type,
                control_type_idx=[],
                added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
                return_dict=False,
            )
        finally:
            hook.remove()
        scales = conditioning_scale[:, :, None, None, None].unbind(1)
        return tuple(residual * scale for residual, scale in zip((*down, mid), scales, strict=True))


def parts(checkpoint: Checkpoint, bundle: Bundle) -> Iterator[Part]:
    """The net, and what makes features of its pictures; each is loaded when it is its turn.

    Raises: CheckpointError if it is made for another model, or takes what no request has.
    """
    config, where = checkpoint.config(MODEL), str(checkpoint.folder)
    _refuse_unsupported(where, config, bundle)
    types, width = config["num_control_type"], config["block_out_channels"][0]
    feature = TensorSpec(FEATURE, "float32", ("images", width, *LATENT))
    yield _net(checkpoint, config, bundle, feature, types)
    yield _condition(checkpoint.load(MODEL), bundle.factor, feature, types)


def described(checkpoint: Checkpoint) -> dict[str, Control]:
    """Its own fields of the manifest."""
    config = checkpoint.config(MODEL)
    count: int = config["num_control_type"]
    names = PUBLISHED[:count] if count in (6, len(PUBLISHED)) else tuple(f"mode_{i}" for i in range(count))
    return {"control": Control(pooled=bool(config["global_pool_conditions"]), modes=names)}


def _net(checkpoint: Checkpoint, config: Mapping[str, Any], bundle: Bundle, feature: TensorSpec, types: int) -> Part:
    model: Any = checkpoint.load(MODEL)
    given = {spec.name: spec for spec in bundle.component("unet").inputs}
    tokens = max(entry.max_length for entry in bundle.manifest.tokenizers.values())
    counted = [{**one, "pictures": count} for one, count in zip(guided_sizes(tokens), COUNTS, strict=True)]
    outputs, sizes = residuals(model, counted)
    refuse_other_model(str(checkpoint.folder), outputs, bundle)
    images, *own = feature.shape
    return Part(
        name=CONTROLNET,
        module=Net(model),
        inputs=(
            TensorSpec("sample", "float32", ("images", config["in_channels"], *LATENT)),
            given["timestep"],
            given["encoder_hidden_states"],
            TensorSpec(FEATURE, "float32", (images, "pictures", *own)),
            TensorSpec(KEPT, "float32", ("images", "pictures")),
            TensorSpec(TYPE, "float32", ("images", types)),
            TensorSpec(SCALE, "float32", ("batch", len(outputs))),
            *(given[name] for name in FURTHER),
        ),
        outputs=outputs,
        sizes=sizes,
        shared=("sample", "timestep", FEATURE, KEPT, TYPE),
        unused=dict.fromkeys(OF_CONDITION, f"{CONDITION} computes with it"),
    )


def _condition(model: Any, factor: int, feature: TensorSpec, types: int) -> Part:
    sizes = ({"images": 2, LATENT[0]: 11, LATENT[1]: 13}, {"images": 1, LATENT[0]: 16, LATENT[1]: 24})
    return Part(
        name=CONDITION,
        module=Condition(model),
        inputs=(
            TensorSpec(PICTURE, "float32", ("images", 3, "height", "width")),
            TensorSpec("control_mode", "int32", ("images",)),
            TensorSpec("scale", "float32", ("images", 1)),
        ),
        outputs=(feature,),
        sizes=tuple({**one, "height": factor * one[LATENT[0]], "width": factor * one[LATENT[1]]} for one in sizes),
        limits={"control_mode": types},
    )


def _refuse_unsupported(where: str, config: Mapping[str, Any], bundle: Bundle) -> None:
    """Raises: CheckpointError that names the key."""
    if "text_embeds" not in {spec.name for spec in bundle.component("unet").inputs}:
        raise CheckpointError(f"{where}: a union ControlNet is made for SDXL, and {bundle.path} is no SDXL model")
    refuse_unsupported(where, config, bundle)
    order, channels = config["controlnet_conditioning_channel_order"], config["conditioning_channels"]
    if order != "rgb" or channels != 3:
        raise CheckpointError(
            f"{where}: controlnet_conditioning_channel_order is {order!r} and conditioning_channels {channels!r}; a "
            "union ControlNet sees pictures in 'rgb', of 3 channels"
        )
    width, keys = config["block_out_channels"][0], ("num_trans_channel", "num_proj_channel")
    for key in keys:
        if config[key] != width:
            raise CheckpointError(f"{where}: {key} is {config[key]!r}: the net's first block has {width} channels")
