"""A ControlNet in one .safetensors file, plain or a union, becomes a diffusers folder with one model.

| the names in the file                                    | are those of                                      |
|----------------------------------------------------------|---------------------------------------------------|
| control_model.input_blocks.0.0.weight                    | the original code, as it was published            |
| input_blocks.0.0.weight                                  | the same without the prefix                       |
| conv_in.weight, controlnet_cond_embedding.conv_in.weight | diffusers                                         |
| lora_controlnet, input_blocks.0.0.up                     | a Control-LoRA; see `control_lora`                |

Such a file holds no configuration. It is that of the published UNet which the ControlNet is a copy of, with the depth
and the channels that the tensors have.
A union ControlNet (controlnet-union-sdxl-1.0, also ProMax) has a task embedding for each of its modes. Its published
files have the names of diffusers; no file with a union ControlNet under those of the original code is known.
Ref: github.com/lllyasviel/ControlNet, cldm/cldm.py; github.com/xinsir6/ControlNetPlus
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from sdopt.bundle.files import Bundle
from sdopt.errors import CheckpointError
from sdopt.export.checkpoint import MODEL, Checkpoint
from sdopt.export.single_file import control_lora, convert, names, tiny_vae
from sdopt.export.single_file.file import Shape, SingleFile
from sdopt.export.single_file.names import Layout
from sdopt.export.single_file.published import UNET, UNET_2, UNET_XL, Config

CONTROLNET, UNION = "ControlNetModel", "ControlNetUnionModel"
TASKS = "task_embedding"  # of a union ControlNet alone: [modes, channels]
LAYOUTS = {  # a tensor that only this layout has -> the layout
    "control_model.input_hint_block.0.weight": Layout("control_model.", names.controlnet),
    "input_hint_block.0.weight": Layout("", names.controlnet),
    "controlnet_cond_embedding.conv_in.weight": Layout("", names.own),
}
BASE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")  # of the trained model
WIDTH_XL = 2048
UNETS = {768: ("sd1", UNET), 1024: ("sd2", UNET_2), WIDTH_XL: ("sdxl-base", UNET_XL)}  # by the width of the text
OF_UNET = (  # keys that a ControlNet's configuration shares with the UNet's
    "layers_per_block",
    "block_out_channels",
    "attention_head_dim",
    "cross_attention_dim",
    "use_linear_projection",
    "upcast_attention",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
POOLED = re.compile(r"(^|[^a-z])shuffle([^a-z]|$)", re.IGNORECASE)  # in the file's name; no tensor tells it
# how names of a file that has no such net look -> what it is, and what to do
REFUSED: Mapping[str, str] = {
    r"difference|control_model\.difference": (
        "holds differences from a base model; give the ControlNet itself, without them"
    ),
    r"lllite_.*": "is a ControlNet-LLLite, which is not exported",
    r"lora_(unet|te\d?)_.*|.*[._]lora[._]?(up|down|A|B)\..*": "is a LoRA; load it: pipe.load_lora_weights(FILE)",
    r"model\.diffusion_model\..*": "is a whole model; to make a bundle of it: sdopt export FILE -o BUNDLE",
    r"(image_proj|ip_adapter)\..*": "is an IP-Adapter, and no ControlNet",
    r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|conv_out|mid|mid_block)\..*": (
        "is an autoencoder of full size; what is added to a bundle is a tiny one, such as madebyollin/taesd"
    ),
}


def unpack(path: Path, folder: Path, config: Mapping[str, Any] | None = None, base: Bundle | None = None) -> Checkpoint:
    """The net in a file, written into `folder` as diffusers writes one model, in the file's precision.

    `config`: its configuration, where it is no published one. `base`: the bundle whose UNet a Control-LoRA is merged
    with, in float32.
    Raises: CheckpointError that says what the file is, or names all tensors that do not fit.
    """
    file, provenance = SingleFile.open(path), {"file": path.name}
    if tiny_vae.is_tiny_vae(file):
        return tiny_vae.unpack(file, folder, config)
    if base is not None and control_lora.is_control_lora(file):
        file, provenance = control_lora.merged(file, base), {**provenance, **control_lora.provenance(base)}
    layout = next((layout for name, layout in LAYOUTS.items() if name in file.shapes), None)
    if layout is None:
        raise CheckpointError(f"{path} {_what_it_is(file)}")
    if layout.prefix:
        file = replace(file, shapes={name: shape for name, shape in file.shapes.items() if not name.startswith(BASE)})
    hint = "Its configuration is the one that was given: give that of the file's own net."
    if config is None:
        provenance["configurations"], config = configuration(file, layout.prefix)
        hint = (
            f"A single file holds no configuration, and that of a ControlNet of {provenance['configurations']} was "
            "taken, which its tensors are most like. If it is another one, give its folder of diffusers."
        )
    folder.mkdir(parents=True)
    if config["_class_name"] not in (CONTROLNET, UNION):
        raise CheckpointError(
            f"{path} is a ControlNet, and the configuration that was given is that of a {config['_class_name']}; "
            "give that of the file's own net"
        )
    if _is_union(file.shapes) != (config["_class_name"] == UNION):
        one = "a union" if _is_union(file.shapes) else "no union"
        raise CheckpointError(
            f"{path} is {one} ControlNet, and the configuration that was given is that of a {config['_class_name']}; "
            "give that of the file's own net"
        )
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    checkpoint = Checkpoint(folder, {MODEL: f"diffusers.{config['_class_name']}"}, None, provenance)
    shapes = checkpoint.shapes(MODEL)
    origins = convert.plan(file, {"controlnet": shapes}, {"controlnet": (layout,)}, hint)["controlnet"]
    convert.write(file, "the ControlNet", origins, shapes, folder / "diffusion_pytorch_model.safetensors")
    return checkpoint


def configuration(file: SingleFile, prefix: str) -> tuple[str, Config]:
    """The published model that a ControlNet in a file is made for, and its configuration.

    `prefix`: what the names of its tensors begin with.
    Raises: CheckpointError if it is made for no published model.
    """
    shapes = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if not widths and {"add_embedding.linear_1.weight", "label_emb.0.0.weight"} & shapes.keys():
        widths = {WIDTH_XL}  # a small one, without attention
    (width, *others) = widths or {0}
    if others or width not in UNETS:
        raise CheckpointError(
            f"{file.path} is a ControlNet whose text has {', '.join(map(str, sorted(widths))) or 'no'} features; "
            "published models have 768, 1024 or 2048. Give its folder of diffusers, which has config.json"
        )
    name, unet = UNETS[width]
    depths = [_depth(shapes, level) for level in range(len(cast("list[int]", unet["block_out_channels"])))]
    middle = _depth(shapes, None)
    hint = shapes.get("input_hint_block.0.weight") or shapes["controlnet_cond_embedding.conv_in.weight"]
    config: dict[str, Any] = {
        "_class_name": CONTROLNET,
        **{key: unet[key] for key in OF_UNET if key in unet},
        "conditioning_channels": hint[1],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "transformer_layers_per_block": [depth or 1 for depth in (*depths[:-1], depths[-1] or middle)],
        "global_pool_conditions": bool(POOLED.search(file.path.stem)),
    }
    return name, _union(config, shapes) if _is_union(shapes) else config


def _is_union(shapes: Mapping[str, Shape]) -> bool:
    return len(shapes.get(TASKS, ())) == 2


def _union(config: Config, shapes: Mapping[str, Shape]) -> Config:
    """The configuration of a union ControlNet. The number of heads is that of the published ones."""
    modes, channels = shapes[TASKS]
    embedding = "controlnet_cond_embedding"
    widths = [f"{embedding}.conv_in.weight", *(f"{embedding}.blocks.{i}.weight" for i in range(1, len(shapes), 2))]
    own: Config = {
        "_class_name": UNION,
        "conditioning_embedding_out_channels": [shapes[name][0] for name in widths if name in shapes],
        "num_control_type": modes,
        "num_trans_channel": channels,
        "num_trans_layer": len({name.split(".")[1] for name in shapes if name.startswith("transformer_layes.")}),
        "num_proj_channel": shapes.get("spatial_ch_projs.weight", (channels,))[0],
    }
    middle = "mid_block_type"  # which it always has in full
    return {**{key: value for key, value in config.items() if key != middle}, **own}


def _depth(shapes: Mapping[str, Shape], level: int | None) -> int:
    """How many transformer blocks the attention of a level has, or that of the middle; 0 without attention."""
    if level is None:
        places = r"mid_block\.attentions\.0", r"middle_block\.1"
    else:  # a level of the original code begins after those before it, each of 2 layers and what makes it smaller
        places = rf"down_blocks\.{level}\.attentions\.0", rf"input_blocks\.{1 + 3 * level}\.1"
    pattern = re.compile(rf"({'|'.join(places)})\.transformer_blocks\.(\d+)\.")
    return len({match[2] for match in map(pattern.match, shapes) if match})


def _what_it_is(file: SingleFile) -> str:
    """What a file without a ControlNet is, for an error."""
    for pattern, what in REFUSED.items():
        if any(re.fullmatch(pattern, name) for name in file.shapes):
            return what
    some = ", ".join(sorted(file.shapes)[:3])
    return (
        f"has no ControlNet (no {', no '.join(LAYOUTS)}); it has {some or 'no tensors'}. Give a file with a ControlNet "
        "of Stable Diffusion 1, 2 or SDXL, or a folder of diffusers"
    )
