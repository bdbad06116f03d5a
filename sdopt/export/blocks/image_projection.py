"""The projection of an IP-Adapter: the encoded picture to tokens, and these to the keys and values of every layer.

| layout of the file             | tokens      | reads                                                        |
|--------------------------------|-------------|--------------------------------------------------------------|
| base: `image_proj.proj.weight` | 4           | the vector of the whole picture                              |
| plus: `image_proj.latents`     | 16, as many | the states of all patches, by attention of learned queries   |
|                                | as latents  | (a resampler)                                                |
| full: `image_proj.proj.3`      | 257, one of | the states of all patches, each by a linear of two layers    |
|                                | each patch  |                                                              |

Ref: Ye et al. 2023, arXiv:2308.06721; its authors' files, h94/IP-Adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdopt.bundle.adapter import IMAGE_PROJECTION
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export import accounting
from sdopt.export.part import Part
from sdopt.graph.image_prompt import KEYS, VALUES

Tensors = Mapping[str, torch.Tensor]
BASE, PLUS, FULL = "base", "plus", "full"
BASE_TOKENS, HEAD = 4, 64  # tokens of the base layout; the resampler's features of a head
PROJECTION, ATTENTION = "image_proj.", "ip_adapter."  # how the names of a file's tensors begin
# how a name in the file looks -> what it is called in diffusers' model; a name in that form already stays
RENAMED: Mapping[str, Sequence[tuple[str, str]]] = {
    BASE: ((r"proj\.(.*)", r"image_embeds.\1"),),
    FULL: (
        (r"proj\.0\.(.*)", r"ff.net.0.proj.\1"),
        (r"proj\.2\.(.*)", r"ff.net.2.\1"),
        (r"proj\.3\.(.*)", r"norm.\1"),
    ),
    PLUS: (
        (r"(layers\.\d+)\.0\.norm1\.(.*)", r"\1.ln0.\2"),
        (r"(layers\.\d+)\.0\.norm2\.(.*)", r"\1.ln1.\2"),
        (r"(layers\.\d+)\.(?:0|attn)\.to_out\.weight", r"\1.attn.to_out.0.weight"),
        (r"(layers\.\d+)\.0\.(to_\w+)\.weight", r"\1.attn.\2.weight"),
        (r"(layers\.\d+)\.1\.0\.(.*)", r"\1.ff.0.\2"),
        (r"(layers\.\d+)\.1\.1\.weight", r"\1.ff.1.net.0.proj.weight"),
        (r"(layers\.\d+)\.1\.3\.weight", r"\1.ff.1.net.2.weight"),
    ),
}
FACES = "it sees the embedding of a face by insightface, which sdopt does not compute; IP-Adapters of CLIP are exported"


class Projection(torch.nn.Module):
    """The encoded picture to the keys and values of all layers, side by side. Parameters have the file's names."""

    def __init__(self, image_proj: torch.nn.Module, layers: Sequence[tuple[torch.nn.Linear, torch.nn.Linear]]) -> None:
        super().__init__()
        self.image_proj = image_proj
        pairs = [torch.nn.ModuleDict({"to_k_ip": key, "to_v_ip": value}) for key, value in layers]
        self.ip_adapter = torch.nn.ModuleDict({str(2 * i + 1): pair for i, pair in enumerate(pairs)})

    def forward(self, image_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.image_proj(image_embeds)
        keys, values = (
            torch.cat([pair[name](tokens) for pair in self.ip_adapter.values()], -1)  # pyright: ignore
            for name in ("to_k_ip", "to_v_ip")
        )
        return keys, values


def layout(where: str, names: Sequence[str]) -> str:
    """Which layout a file has, by the names of its tensors.

    Raises: CheckpointError for one that is not exported, by its name.
    """
    own = {name.removeprefix(PROJECTION) for name in names if name.startswith(PROJECTION)}
    if "perceiver_resampler.proj_in.weight" in own:
        raise CheckpointError(f"{where} is an IP-Adapter FaceID Plus: {FACES}")
    if {"norm.weight", "proj.2.weight"} <= own or any("lora" in name for name in names):
        raise CheckpointError(f"{where} is an IP-Adapter FaceID: {FACES}")
    marks = {BASE: "proj.weight", FULL: "proj.3.weight", PLUS: "latents"}
    for name, mark in marks.items():
        if mark in own:
            return name
    known = ", ".join(f"{PROJECTION}{mark}" for mark in marks.values())
    raise CheckpointError(
        f"{where} is no IP-Adapter that is exported: it has none of {known}; it has {accounting.listed(sorted(names))}"
    )


def part(where: str, tensors: Tensors, embeds: TensorSpec, text: int, widths: Mapping[str, int]) -> Part:
    """The projection, ready to be traced.

    `embeds`: what the image encoder gives. `text`: the features of the UNet's text. `widths`: the features of each of
    its cross-attentions by name, in the order in which the file numbers them.
    Raises: CheckpointError for tensors that are missing, unknown or of another shape.
    """
    kind = layout(where, list(tensors))
    given = _renamed(kind, {k.removeprefix(PROJECTION): t for k, t in tensors.items() if k.startswith(PROJECTION)})
    _refuse_unfit(where, kind, given, embeds)
    with torch.device("meta"):
        image_proj, tokens = _model(where, kind, given, text, embeds)
        layers = [(_linear(text, width), _linear(text, width)) for width in widths.values()]
        module = Projection(image_proj, layers)
    attention = {name: tensor for name, tensor in tensors.items() if name.startswith(ATTENTION)}
    other = [name for name in tensors if not name.startswith((PROJECTION, ATTENTION))]
    named = {**{PROJECTION + name: tensor for name, tensor in given.items()}, **attention}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    count = len({name.split(".")[1] for name in attention})
    if count != len(layers):
        raise CheckpointError(
            f"{where}: it is made for a UNet with {count} cross-attentions, and that of the bundle has {len(layers)}"
        )
    accounting.refuse(
        where,
        "It is made for another model, or its file is damaged",
        lacking=sorted(wanted.keys() - named.keys()),
        unknown=sorted(other + list(named.keys() - wanted.keys())),
        unlike=[
            f"{name} {list(tensor.shape)} instead of {list(wanted[name])}"
            for name, tensor in sorted(named.items())
            if name in wanted and tuple(tensor.shape) != wanted[name]
        ],
        integers=sorted(name for name, tensor in named.items() if not tensor.dtype.is_floating_point),
    )
    module.load_state_dict({name: tensor.float().contiguous() for name, tensor in named.items()}, assign=True)
    accounting.require_finite(Path(where), module)
    total = sum(widths.values())
    return Part(
        name=IMAGE_PROJECTION,
        module=module.eval().requires_grad_(False),
        inputs=(embeds,),
        outputs=tuple(TensorSpec(name, "float32", ("pictures", tokens, total)) for name in (KEYS, VALUES)),
        sizes=({"pictures": 2}, {"pictures": 1}, {"pictures": 3}),
    )


def _linear(text: int, width: int) -> torch.nn.Linear:
    return torch.nn.Linear(text, width, bias=False)


def _renamed(kind: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors by the names of diffusers' model; keys and values of a resampler, which stand in one, apart."""
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, new in RENAMED[kind]:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, new, name)
                break
        if kind == PLUS and name.endswith("to_kv.weight") and len(tensor) % 2 == 0:
            for to, half in zip(("to_k", "to_v"), tensor.chunk(2), strict=True):
                named[name.replace("to_kv", to)] = half
        else:
            named[name] = tensor
    return named


def _refuse_unfit(where: str, kind: str, given: Tensors, embeds: TensorSpec) -> None:
    """Raises: CheckpointError if it reads another width than the image encoder gives."""
    name = {BASE: "image_embeds.weight", PLUS: "proj_in.weight", FULL: "ff.net.0.proj.weight"}[kind]
    reads = given[name].shape[-1] if name in given and given[name].ndim == 2 else None
    if reads is not None and reads != embeds.shape[-1]:
        raise CheckpointError(
            f"{where}: it reads {reads} features of a picture, and the image encoder gives {embeds.shape[-1]}; name "
            "its own image encoder: image_encoder=FOLDER, or --image-encoder FOLDER"
        )


def _model(where: str, kind: str, given: Tensors, text: int, embeds: TensorSpec) -> tuple[torch.nn.Module, int]:
    """diffusers' model of this layout without weights, and its tokens for each picture."""
    from diffusers.models import embeddings

    models: Any = embeddings
    width = embeds.shape[-1]
    if kind == BASE:
        return models.ImageProjection(width, text, BASE_TOKENS), BASE_TOKENS
    if kind == FULL:
        assert isinstance(embeds.shape[1], int)
        return models.IPAdapterFullImageProjection(width, text), embeds.shape[1]
    queries = {name: given[name].shape for name in ("latents", "layers.0.attn.to_q.weight") if name in given}
    inner, latents = queries.get("layers.0.attn.to_q.weight", (0,)), queries["latents"]
    up = given.get("layers.0.ff.1.net.0.proj.weight")
    if len(latents) != 3 or not inner[0] or inner[0] % HEAD or up is None:
        raise CheckpointError(f"{where}: its resampler is not one whose heads have {HEAD} features")
    depth = len({name.split(".")[1] for name in given if name.startswith("layers.")})
    model = models.IPAdapterPlusImageProjection(
        embed_dims=width,
        output_dims=text,
        hidden_dims=latents[2],
        depth=depth,
        dim_head=HEAD,
        heads=inner[0] // HEAD,
        num_queries=latents[1],
        ffn_ratio=len(up) / latents[2],
    )
    return model, int(latents[1])
