"""Where a parameter of a diffusers model is in a file of the original code.

The original UNet numbers its blocks through, from the first convolution on; diffusers numbers them level by level.
OpenCLIP's text encoder keeps queries, keys and values in one matrix, and its projection transposed.
Ref: github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py and model.py;
github.com/mlfoundations/open_clip, src/open_clip/transformer.py; github.com/lllyasviel/ControlNet, cldm/cldm.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from sdopt.bundle.original_names import unet_names
from sdopt.bundle.transformer_names import originals
from sdopt.dataclass import dataclass


@dataclass(frozen=True)
class Origin:
    """The tensor of the file that a parameter is made from.

    `third`: which third of its rows the parameter is; None for all rows. `rows`: where the parameter is another part,
    its first row, the end of its rows, and how many the tensor has. `transposed`: rows are columns. `swapped`: its
    second half comes first.
    """

    name: str
    third: int | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None
    swapped: bool = False


Origins = tuple[Origin, ...]  # where a parameter may be: the first that the file has is taken; empty: nowhere
Shapes = Mapping[str, tuple[int, ...]]
Names = Callable[[Shapes], Mapping[str, Origins]]  # from the shapes of a model's parameters, by their names


@dataclass(frozen=True)
class Layout:
    """One way in which files have a component: what all its names begin with, and what follows."""

    prefix: str
    names: Names


HINT = "controlnet_cond_embedding"  # the part of a ControlNet that makes the picture as small as the latents
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet(parameters: Collection[str]) -> dict[str, Origins]:
    """Of a UNet2DConditionModel."""
    of_module = unet_names({name.rpartition(".")[0] for name in parameters})
    return {name: _one(_leaf(of_module, name)) for name in parameters}


def controlnet(parameters: Collection[str]) -> dict[str, Origins]:
    """Of a ControlNetModel, whose copy of the UNet's downward path has the UNet's names."""
    modules = {name.rpartition(".")[0] for name in parameters}
    hints = len({module for module in modules if module.startswith(f"{HINT}.blocks.")})
    of_module = {
        **unet_names(modules),
        **{module: _control_name(module, hints) for module in modules if _is_own(module)},
    }
    return {name: _one(_leaf(of_module, name)) for name in parameters}


def _is_own(module: str) -> bool:
    """Whether a module of a ControlNet is none of the UNet's."""
    return module.startswith("controlnet_")


def _control_name(module: str, hints: int) -> str | None:
    """The path of a ControlNet's own module. `hints`: the convolutions between the first and the last of the hint."""
    if module == "controlnet_mid_block":
        return "middle_block_out.0"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", module):
        return f"zero_convs.{match[1]}.0"
    place = {f"{HINT}.conv_in": 0, f"{HINT}.conv_out": hints + 1}.get(module)
    if match := re.fullmatch(rf"{HINT}\.blocks\.(\d+)", module):
        place = 1 + int(match[1])
    return None if place is None else f"input_hint_block.{2 * place}"  # an activation follows each convolution


def own(parameters: Collection[str]) -> dict[str, Origins]:
    """Of a model in a file that has diffusers' names."""
    return {name: _one(name) for name in parameters}


def _leaf(of_module: Mapping[str, str | None], name: str) -> str | None:
    """The name of a parameter, by that of its module."""
    module, _, leaf = name.rpartition(".")
    original = of_module[module]
    return None if original is None else f"{original}.{leaf}"


def vae(parameters: Collection[str]) -> dict[str, Origins]:
    """Of an AutoencoderKL. The original numbers the decoder's blocks from the picture on."""
    last = max((int(name.split(".")[2]) for name in parameters if name.startswith("decoder.up_blocks.")), default=0)
    return {name: _one(_vae_name(name, last)) for name in parameters}


def _vae_name(name: str, last: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(\w+)", name)
    if attention is None:
        return name
    return f"{attention[1]}mid.attn_1.{VAE_ATTENTION.get(attention[2], attention[2])}.{attention[3]}"


def clip(parameters: Collection[str]) -> dict[str, Origins]:
    """Of a CLIPTextModel in a file that has the names of transformers, behind a prefix."""
    return {name: _one(name.removeprefix("text_model.")) for name in parameters}


def open_clip(parameters: Collection[str]) -> dict[str, Origins]:
    """Of a CLIPTextModel in a file that has the names of OpenCLIP."""
    return {name: _open_clip(name.removeprefix("text_model.")) for name in parameters}


def _open_clip(name: str) -> Origins:
    if name == "text_projection.weight":
        return (Origin("text_projection", transposed=True), Origin("text_projection.weight"))
    name = re.sub(r"^encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1.", name)
    attention = re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", name)
    if attention:
        return (Origin(f"{attention[1]}attn.in_proj_{attention[3]}", third="qkv".index(attention[2])),)
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return _one(name)


def transformer(shapes: Shapes) -> dict[str, Origins]:
    """Of an SD3Transformer2DModel or a FluxTransformer2DModel, whose attention is split along the outputs."""
    found: dict[str, Origins] = {"pos_embed.pos_embed": _one("pos_embed")} if "pos_embed.pos_embed" in shapes else {}
    for original in originals({name.rpartition(".")[0] for name in shapes}):
        for leaf in ("weight", "bias"):
            parts = [part for module in original.modules if (part := f"{module}.{leaf}") in shapes]
            there = "scale" if original.path.endswith(("query_norm", "key_norm")) else leaf
            first, total = 0, sum(shapes[part][0] for part in parts)
            for part in parts:
                end = first + shapes[part][0]
                rows = (first, end, total) if len(parts) > 1 else None
                found[part] = (Origin(f"{original.path}.{there}", rows=rows, swapped=original.swapped),)
                first = end
    return {name: found.get(name, ()) for name in shapes}


def t5(parameters: Collection[str]) -> dict[str, Origins]:
    """Of a T5EncoderModel, which has its embeddings twice; files may have them once."""
    both = "shared.weight", "encoder.embed_tokens.weight"
    return {name: tuple(map(Origin, (name, *both))) if name in both else _one(name) for name in parameters}


def projected_clip(parameters: Collection[str]) -> dict[str, Origins]:
    """Of a CLIPTextModelWithProjection in a file of SD3, behind a prefix."""
    return {name: _one(name if "projection" in name else f"text_model.{name}") for name in _bare(parameters)} | {
        name: _one(name) for name in parameters if name.startswith("text_model.")
    }


def _bare(parameters: Collection[str]) -> list[str]:
    return [name for name in parameters if not name.startswith("text_model.")]


def _one(name: str | None) -> Origins:
    return () if name is None else (Origin(name),)


UNETS = (Layout("model.diffusion_model.", unet),)
TRANSFORMERS = (Layout("model.diffusion_model.", transformer), Layout("", transformer))
T5S = (Layout("text_encoders.t5xxl.transformer.", t5),)
CLIP_L = (Layout("text_encoders.clip_l.transformer.", projected_clip),)
CLIP_G = (Layout("text_encoders.clip_g.transformer.", projected_clip),)
VAES = (Layout("first_stage_model.", vae), Layout("vae.", vae))


def text_encoders(place: str) -> tuple[Layout, ...]:
    """The layouts of a text encoder at `place`, such as "cond_stage_model"."""
    return (
        Layout(f"{place}.transformer.text_model.", clip),
        Layout(f"{place}.transformer.", clip),  # as the first scripts that merged models wrote them
        Layout(f"{place}.model.", open_clip),
    )
