"""Tiny random ControlNets, made for the tiny checkpoints of `tests.tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def controlnet(checkpoint: Path, seed: int = 3, **changes: Any) -> Any:
    """A ControlNet for the UNet of a checkpoint. What training begins with as zeros is random here."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(6, 10), load_weights_from_unet=False)
    if changes:
        net = ControlNetModel.from_config({**net.config, **changes})
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.15)
    return net.eval()


def edges(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    """A picture for a ControlNet to see."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def union(checkpoint: Path, seed: int = 3, types: int = 6, **changes: Any) -> Any:
    """A union ControlNet for the UNet of an SDXL checkpoint. What training begins with as zeros is random here."""
    import torch
    from diffusers import ControlNetUnionModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    width = unet.config["block_out_channels"][0]
    accepted = set(ControlNetUnionModel.load_config.__self__._get_init_keys(ControlNetUnionModel))
    shared = {key: value for key, value in unet.config.items() if key in accepted and not key.startswith("_")}
    own = {
        "conditioning_embedding_out_channels": (6, 10),
        "num_control_type": types,
        "num_trans_channel": width,
        "num_trans_head": 2,
        "num_trans_layer": 2,
        "num_proj_channel": width,
    }
    torch.manual_seed(seed)
    net = ControlNetUnionModel(**{**shared, **own, **changes})
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.15)
    return net.eval()
