"""The names that the modules of SD3's and Flux's transformers have in the original code.

That code keeps queries, keys and values in one matrix, and in Flux's single blocks also the first layer of the MLP;
diffusers splits it along the outputs. Single files of checkpoints have these names, and so do some LoRA files.
Ref: github.com/Stability-AI/sd3.5, mmditx.py; github.com/black-forest-labs/flux, src/flux/model.py
"""

from __future__ import annotations

import re
from collections.abc import Collection

from sdopt.dataclass import dataclass


@dataclass(frozen=True)
class Original:
    """A module of the original code: its path, and diffusers' modules that it is, one after another along the outputs.

    `swapped`: its outputs are the shift, then the scale; diffusers has the scale first.
    """

    path: str
    modules: tuple[str, ...]
    swapped: bool = False


OUTSIDE_SD3 = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
OUTSIDE_FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
# in a block of diffusers, split by spaces where the original has one module for several -> in the original block
OF_SD3 = {
    "attn.to_q attn.to_k attn.to_v": "x_block.attn.qkv",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "context_block.attn.qkv",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
OF_FLUX = {
    "attn.to_q attn.to_k attn.to_v": "img_attn.qkv",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
OF_FLUX_SINGLE = {
    "attn.to_q attn.to_k attn.to_v proj_mlp": "linear1",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}
LAST = "norm_out.linear", "final_layer.adaLN_modulation.1"
BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.")


def originals(modules: Collection[str]) -> list[Original]:
    """The modules of the original code that a transformer's modules are, by their paths in diffusers."""
    is_flux = "x_embedder" in modules
    outside = OUTSIDE_FLUX if is_flux else OUTSIDE_SD3
    found = [Original(path, (own,)) for own, path in outside.items() if own in modules]
    if LAST[0] in modules:
        found.append(Original(LAST[1], (LAST[0],), swapped=True))
    blocks = {(match[1], int(match[2])) for module in modules if (match := BLOCK.match(module))}
    last = max((number for _, number in blocks), default=0)
    for kind, number in sorted(blocks):
        for parts, original in _table(is_flux, kind).items():
            own = tuple(f"{kind}.{number}.{part}" for part in parts.split())
            if own[0] in modules:  # SD3's last block has no second half, and its norm is a last one
                is_final = not is_flux and number == last and parts == "norm1_context.linear"
                found.append(Original(f"{_block(is_flux, kind)}.{number}.{original}", own, is_final))
    return found


def _table(is_flux: bool, kind: str) -> dict[str, str]:
    if not is_flux:
        return OF_SD3
    return OF_FLUX_SINGLE if kind.startswith("single") else OF_FLUX


def _block(is_flux: bool, kind: str) -> str:
    if not is_flux:
        return "joint_blocks"
    return "single_blocks" if kind.startswith("single") else "double_blocks"
