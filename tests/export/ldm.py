"""A diffusers folder as the one .safetensors file that the original code wrote (equal layers in all blocks)."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, attended: set[int], layers: int = 1) -> str:
    """`attended`: the up blocks that have attention, whose upsampler stands one place later. `layers`: of a block."""
    for ours, theirs in UNET_OUTSIDE.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    side, block, kind, layer, rest = re.fullmatch(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    index = (layers + 1) * int(block or 0) + int(layer)
    if kind == "resnets":
        part, leaf = rest.rsplit(".", 1)
        rest = f"{UNET_RESNET[part]}.{leaf}"
    place = {"resnets": 0, "attentions": 1}.get(kind)
    if side == "mid":
        return f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{index + layers + 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{index + layers}.{2 if int(block) in attended else 1}.{rest}"
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


def open_clip(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A text encoder as OpenCLIP has it: queries, keys and values in one matrix, and the projection transposed."""
    import torch

    left = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    out = {
        "positional_embedding": left.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": left.pop("embeddings.token_embedding.weight"),
    }
    if "text_projection.weight" in left:
        out["text_projection"] = left.pop("text_projection.weight").T.contiguous()
    for leaf in ("weight", "bias"):
        out[f"ln_final.{leaf}"] = left.pop(f"final_layer_norm.{leaf}")
        for layer in range(1 + max(int(name.split(".")[2]) for name in left if name.startswith("encoder."))):
            a, b = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            out[f"{b}attn.in_proj_{leaf}"] = torch.cat([left.pop(f"{a}self_attn.{x}_proj.{leaf}") for x in "qkv"])
            for ours, theirs in OPEN_CLIP.items():
                out[f"{b}{theirs}.{leaf}"] = left.pop(f"{a}{ours}.{leaf}")
            if leaf == "bias":
                assert not any(name.startswith(a) for name in left)
    assert not left
    return {prefix + name: tensor for name, tensor in out.items()}


def one_file(weights: dict[str, dict[str, Any]], is_open: bool = False) -> dict[str, Any]:
    """The tensors of all components under their names in one file. `is_open`: the text encoder is OpenCLIP's."""
    unet = weights["unet"]
    attended = {int(m[1]) for name in unet if (m := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    layers = sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1\.bias", name)) for name in unet)
    blocks = 1 + max(int(m[1]) for name in weights["vae"] if (m := re.search(r"up_blocks\.(\d+)", name)))
    merged = {f"model.diffusion_model.{unet_name(n, attended, layers)}": t for n, t in unet.items()}
    merged |= {f"first_stage_model.{vae_name(n, blocks)}": t for n, t in weights["vae"].items()}
    first = "conditioner.embedders.0." if "text_encoder_2" in weights else "cond_stage_model."
    if "text_encoder" in weights and is_open:
        merged |= open_clip(weights["text_encoder"], f"{first}model.")
    elif "text_encoder" in weights:
        prefix = f"{first}transformer.text_model."
        merged |= {prefix + n.removeprefix("text_model."): t for n, t in weights["text_encoder"].items()}
    if "text_encoder_2" in weights:
        second = "conditioner.embedders.1." if "text_encoder" in weights else "conditioner.embedders.0."
        merged |= open_clip(weights["text_encoder_2"], f"{second}model.")
    return merged


def write_single_file(checkpoint: Path, path: Path, is_open: bool = False) -> Path:
    from safetensors.torch import load_file, save_file

    components = ("unet", "vae", "text_encoder", "text_encoder_2")
    files = {name: next((checkpoint / name).glob("*.safetensors"), None) for name in components}
    save_file(one_file({name: load_file(file) for name, file in files.items() if file}, is_open), path)
    return path


def write_header(shapes: dict[str, tuple[int, ...]], path: Path) -> Path:
    """A safetensors file in half precision whose tensors are zeros that take no room on the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        dtype, size = ("I64", 8) if name == "global_step" else ("F16", 2)
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, path.stat().st_size + offset)
    return path


def fill(path: Path, name: str, values: Any) -> None:
    """Write the values of one tensor into a file of `write_header`."""
    data = values.numpy().tobytes()
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        first, end = header[name]["data_offsets"]
        assert end - first == len(data)
        file.seek(8 + length + first)
        file.write(data)
