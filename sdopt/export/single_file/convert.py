"""The models of a single file: every parameter is found in it, every tensor is used, and then they are written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from sdopt.errors import BundleError, CheckpointError
from sdopt.export import accounting
from sdopt.export.single_file import names
from sdopt.export.single_file.file import Shape, SingleFile
from sdopt.export.single_file.names import Layout, Origin

TEXT = r"(cond_stage_model|conditioner\.embedders\.\d)\."
# tensors that published files have beside those of the models: how their names look -> what they are
KNOWN_UNUSED: Mapping[str, str] = {
    r"model_ema\..*|first_stage_model\.model_ema\..*": "running means of training",
    r"(first_stage_model|vae)\.loss\..*": "what the autoencoder was trained against",
    r"betas|alphas_cumprod(_prev)?|sqrt(_one_minus|_recip|_recipm1)?_alphas_cumprod": "noise levels",
    r"log_one_minus_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])": "noise levels",
    r"denoiser\.(log_)?sigmas|lvlb_weights|logvar": "noise levels, and how training weighed them",
    r"global_step|v_pred|ztsnr": "numbers and marks, of which `recognise` reads what matters",
    r"text_encoders\.\w+\.(logit_scale|transformer\.text_projection\.weight)": "what an encoder's class does not read",
    r".*\.position_ids": "the numbers 0, 1, 2, ..., which the model counts itself",
    TEXT + r".*logit_scale": "the temperature of CLIP's training",
    TEXT + r"model\.attn_mask": "the causal mask, which the model makes itself",
    TEXT + r"transformer\.(vision_model\..*|visual_projection\.weight)": "CLIP's other half, which sees pictures",
    r"cond_stage_model\.model\.text_projection(\.weight)?": "the pooled text, which a CLIPTextModel does not compute",
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection\.weight": "the same",
}
FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
NARROWEST = {"F8_E4M3": torch.float16, "F8_E5M2": torch.float16, "F64": torch.float32}  # what is stored instead
PLAIN = "If its weights have a LoRA that is not merged, or are quantized, use a file with plain weights"
Plan = Mapping[str, Mapping[str, Origin]]  # component -> its parameters -> where they are


def plan(
    file: SingleFile, models: Mapping[str, Mapping[str, Shape]], layouts: Mapping[str, tuple[Layout, ...]], hint: str
) -> Plan:
    """Where every parameter of the models is in the file.

    `models`: the shapes of the parameters of each component. `layouts`: how files have each component. `hint`: where
    the configurations come from, for an error.
    Raises: CheckpointError that names the parameters that the file lacks, the tensors of the file that no model has,
    those of another shape, and those that are no floating point numbers.
    """
    lacking, unlike, skipped = list[str](), list[str](), list[str]()
    components: dict[str, dict[str, Origin]] = {}
    for component, shapes in models.items():
        layout = next((layout for layout in layouts[component] if file.has(layout.prefix)), layouts[component][0])
        origins = components[component] = {}
        for parameter, places in layout.names(shapes).items():
            candidates = [replace(place, name=layout.prefix + place.name) for place in places]
            origin = next((candidate for candidate in candidates if candidate.name in file.shapes), None)
            described = f"{component}'s {parameter}"
            if origin is None:
                lacking.append(f"{candidates[0].name} ({described})" if candidates else described)
                continue
            origins[parameter] = origin
            if not _fits(file.shapes[origin.name], shapes[parameter], origin):
                unlike.append(f"{origin.name} is {file.shapes[origin.name]}, {described} is {shapes[parameter]}")
        skipped += _last_layer(layout, shapes)
    used = {origin.name for origins in components.values() for origin in origins.values()}
    unknown = [name for name in file.shapes if name not in used and not _is_known_unused(name, skipped)]
    integers = [f"{name} ({file.dtypes[name]})" for name in used if file.dtypes[name] not in FLOATS]
    accounting.refuse(
        str(file.path), f"{hint} {PLAIN}", lacking=lacking, unknown=unknown, unlike=unlike, integers=integers
    )
    return components


def _fits(there: Shape, wanted: Shape, origin: Origin) -> bool:
    """Whether a parameter of the shape `wanted` can be taken from a tensor of the shape `there`."""
    if origin.rows is not None:
        return there == (origin.rows[2], *wanted[1:])
    if origin.third is not None:
        return there == (3 * wanted[0], *wanted[1:])
    if origin.transposed:
        return there == wanted[::-1]
    return without_ones(there) == without_ones(wanted)


def without_ones(shape: Shape) -> Shape:
    """Without the 1s at its end: a convolution of one pixel is a linear layer."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _last_layer(layout: Layout, shapes: Mapping[str, Shape]) -> list[str]:
    """How the names of OpenCLIP's last layer begin, which Stable Diffusion 2 skips and its configuration leaves out.

    Ref: github.com/Stability-AI/stablediffusion, configs: FrozenOpenCLIPEmbedder, layer: "penultimate"
    """
    if layout.names is not names.open_clip or not layout.prefix.startswith("cond_stage_model."):
        return []
    layers = {match[1] for name in shapes if (match := re.search(r"encoder\.layers\.(\d+)\.", name))}
    return [f"{layout.prefix}transformer.resblocks.{len(layers)}."]


def _is_known_unused(name: str, skipped: list[str]) -> bool:
    return name.startswith(tuple(skipped)) or any(re.fullmatch(pattern, name) for pattern in KNOWN_UNUSED)


def write(
    file: SingleFile, component: str, origins: Mapping[str, Origin], shapes: Mapping[str, Shape], path: Path
) -> None:
    """Write the parameters of one component as a safetensors file, in the precision that they have.

    Raises: BundleError if the disk is full; CheckpointError if the file cannot be read.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors: dict[str, torch.Tensor] = {}
        for name, origin in origins.items():
            is_second = any(origin == origins[other] for other in tensors)  # T5 has its embeddings twice
            tensor = _tensor(file, origin, shapes[name])
            tensors[name] = tensor.clone() if is_second else tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.path}: {component} cannot be read: {error}") from error
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
    if free < needed:
        raise BundleError(
            f"{path.parent} has {free / 1e9:.1f} GB free, and {component} of {file.path.name} needs "
            f"{needed / 1e9:.1f} GB while it is exported; set TMPDIR to a folder with more"
        )
    try:
        cast(Any, safetensors.torch).save_file(tensors, path, {"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be written: {error}; set TMPDIR to another folder") from error


def _tensor(file: SingleFile, origin: Origin, shape: Shape) -> torch.Tensor:
    """The parameter that is made from `origin`."""
    if origin.rows is not None:
        tensor = file.rows(origin.name, *origin.rows[:2])
    elif origin.third is None:
        tensor = file.tensor(origin.name)
    else:
        tensor = file.rows(origin.name, origin.third * shape[0], (origin.third + 1) * shape[0])
    if origin.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    tensor = tensor.T if origin.transposed else tensor.reshape(shape)
    return tensor.to(NARROWEST.get(file.dtypes[origin.name], tensor.dtype)).contiguous()
