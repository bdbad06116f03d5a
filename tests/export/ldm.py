"""A diffusers folder as the one .safetensors file that the original code wrote (layers_per_block = 1)."""

from __future__ import annotations

import re
from pathlib import Path

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, attended: set[int]) -> str:
    """`attended`: the up blocks that have attention, whose upsampler stands one place later."""
    for ours, theirs in UNET_OUTSIDE.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    side, block, kind, layer, rest = re.fullmatch(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    index = 2 * int(block or 0) + int(layer)
    if kind == "resnets":
        part, leaf = rest.rsplit(".", 1)
        rest = f"{UNET_RESNET[part]}.{leaf}"
    place = {"resnets": 0, "attentions": 1}.get(kind)
    if side == "mid":
        return f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{2 * int(block) + 2}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{2 * int(block) + 1}.{2 if int(block) in attended else 1}.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{index + (side == 'down')}.{place}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        head, tail = name.split("mid_block.attentions.0.")
        part, leaf = tail.rsplit(".", 1)
        return f"{head}mid.attn_1.{VAE_ATTENTION[part]}.{leaf}"
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)


def write_single_file(checkpoint: Path, path: Path) -> Path:
    from safetensors.torch import load_file, save_file

    weights = {c: load_file(next((checkpoint / c).glob("*.safetensors"))) for c in ("unet", "vae", "text_encoder")}
    attended = {int(m[1]) for name in weights["unet"] if (m := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    blocks = 1 + max(int(m[1]) for name in weights["vae"] if (m := re.search(r"up_blocks\.(\d+)", name)))
    merged = {f"model.diffusion_model.{unet_name(n, attended)}": t for n, t in weights["unet"].items()}
    merged |= {f"first_stage_model.{vae_name(n, blocks)}": t for n, t in weights["vae"].items()}
    prefix = "cond_stage_model.transformer.text_model."
    merged |= {prefix + n.removeprefix("text_model."): t for n, t in weights["text_encoder"].items()}
    save_file(merged, path)
    return path
