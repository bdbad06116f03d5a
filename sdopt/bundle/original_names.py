"""The names that the modules of a UNet have in the original code of Latent Diffusion.

That code numbers its blocks through, from the first convolution on; diffusers numbers them level by level. Single files
of checkpoints have these names, and so do some LoRA files.
Ref: github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py
"""

from __future__ import annotations

import re
from collections.abc import Collection

from sdopt.dataclass import dataclass

UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # the guidance scale of latent consistency models
    "add_embedding.linear_1": "label_emb.0.0",  # SDXL's pooled text and sizes
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_names(modules: Collection[str]) -> dict[str, str | None]:
    """Path of each module of a UNet2DConditionModel -> its path in the original code; None where it has none."""
    down, up = _levels(modules, "down"), _levels(modules, "up")
    return {module: _unet_name(module, down, up) for module in modules}


@dataclass(frozen=True)
class _Level:
    """One block of diffusers' UNet: its first number in the original, how many layers, and whether they attend."""

    first: int
    layers: int
    attends: bool


def _levels(modules: Collection[str], side: str) -> list[_Level]:
    """The blocks of one side. A downsampler has a number of its own; an upsampler shares that of the last layer."""
    levels: list[_Level] = []
    first = 1 if side == "down" else 0  # number 0 of "down" is the first convolution
    while own := [name for name in modules if name.startswith(f"{side}_blocks.{len(levels)}.")]:
        layers = len({name.split(".")[3] for name in own if ".resnets." in name})
        levels.append(_Level(first, layers, any(".attentions." in name for name in own)))
        first += layers + (side == "down" and any(".downsamplers." in name for name in own))
    return levels


def _unet_name(module: str, down: list[_Level], up: list[_Level]) -> str | None:
    """None for a module that no file of the original code has."""
    if module in UNET_OUTSIDE:
        return UNET_OUTSIDE[module]
    match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", module)
    if match is None:
        return None
    side, kind, layer, rest = match[1], match[3], int(match[4]), match[5]
    if kind == "resnets":
        if rest not in RESNET:
            return None
        rest = RESNET[rest]
    if side == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 2 * layer + 1}.{rest}"
    level = (down if side == "down" else up)[int(match[2])]
    if kind == "downsamplers":
        return f"input_blocks.{level.first + level.layers}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{level.first + level.layers - 1}.{2 if level.attends else 1}.{rest}"
    place = {"resnets": 0, "attentions": 1}.get(kind)
    blocks = "input_blocks" if side == "down" else "output_blocks"
    return None if place is None else f"{blocks}.{level.first + layer}.{place}.{rest}"
