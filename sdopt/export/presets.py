"""The defaults of a bundle: size, steps, guidance and strengths.

What the caller asks for comes first, then the checkpoint's generation_config.json, then what is known of the model by
name, of its scheduler and of its pipeline class, and last what the classes of diffusers have as their defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from sdopt.bundle.decode import DecodeError, decode
from sdopt.bundle.format import Defaults
from sdopt.errors import CheckpointError, UsageError
from sdopt.export.source import Checkpoint, read_json

Known = dict[str, Any]  # some of the fields of Defaults

KEYS = tuple(f.name for f in fields(Defaults))
# the arguments' defaults in diffusers 0.42; `strength_cuts`: image to image leaves out steps, or (LCM) keeps their
# number and shortens the schedule that they are spread over
FAMILIES: dict[str, Known] = {
    "sd": {"num_inference_steps": 50, "guidance_scale": 7.5, "strength": 0.8, "inpaint_strength": 1.0},
    "sdxl": {"num_inference_steps": 50, "guidance_scale": 5.0, "strength": 0.3, "inpaint_strength": 0.9999},
}
LCM: Known = {"strength_cuts": "schedule"}
PIPELINES: dict[str, Known] = {
    "StableDiffusionXLInpaintPipeline": {"guidance_scale": 7.5},
    "LatentConsistencyModelPipeline": LCM,
    "LatentConsistencyModelImg2ImgPipeline": LCM,
}
# distilled with LCM-LoRA, which is used without guidance. Ref: Luo et al. 2023, arXiv:2311.05556
SCHEDULERS: dict[str, Known] = {"LCMScheduler": {"num_inference_steps": 4, "guidance_scale": 1.0}}
# a UNet that takes the guidance scale is distilled with it
EMBEDDED: Known = {"num_inference_steps": 4, "guidance_scale": 8.5}
# as their model cards run them; ids on the hub, found in the source or in a `_name_or_path` of the checkpoint
MODELS: dict[str, Known] = {
    "stabilityai/sd-turbo": {"num_inference_steps": 1, "guidance_scale": 0.0},
    "stabilityai/sdxl-turbo": {"num_inference_steps": 1, "guidance_scale": 0.0},
    "SimianLuo/LCM_Dreamshaper_v7": {"num_inference_steps": 4, "guidance_scale": 8.0},
    "latent-consistency/lcm-sdxl": {"num_inference_steps": 4, "guidance_scale": 8.0},
    "latent-consistency/lcm-ssd-1b": {"num_inference_steps": 4, "guidance_scale": 8.0},
    "segmind/SSD-1B": {"guidance_scale": 9.0},
    "segmind/Segmind-Vega": {"guidance_scale": 9.0},
}


def defaults(checkpoint: Checkpoint, factor: int, steps: int | None = None, guidance: float | None = None) -> Defaults:
    """The `defaults` entry of the manifest; `factor` is the VAE's, pixels per latent.

    Raises: UsageError for steps or guidance that no picture can be made with; CheckpointError for such a
        generation_config.json.
    """
    if steps is not None and steps < 1:
        raise UsageError(f"steps = {steps}; allowed are whole numbers from 1")
    if guidance is not None and not math.isfinite(guidance):
        raise UsageError(f"guidance = {guidance}; allowed are finite numbers")
    edge: Any = checkpoint.config("unet")["sample_size"]
    high, wide = cast("list[int]", edge if isinstance(edge, list) else [edge, edge])
    found: Known = {"height": high * factor, "width": wide * factor, "strength_cuts": "steps"}
    found |= FAMILIES[checkpoint.family]
    for layer in (
        SCHEDULERS.get(str(checkpoint.config("scheduler").get("_class_name")), {}),
        EMBEDDED if checkpoint.config("unet").get("time_cond_proj_dim") else {},
        PIPELINES.get(checkpoint.pipeline, {}),
        _known(checkpoint),
        _own(checkpoint),
        {"num_inference_steps": steps, "guidance_scale": guidance},
    ):
        found |= {key: value for key, value in layer.items() if value is not None}
    try:
        return decode(Defaults, {key: found[key] for key in KEYS}, "defaults")
    except DecodeError as error:
        raise CheckpointError(f"{checkpoint.folder}: what it says of its pictures cannot be: {error}") from error


def _known(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What is known of the model by one of the names that it goes by."""
    names: list[Any] = [checkpoint.provenance.get("hub_id"), checkpoint.index().get("_name_or_path")]
    names.append(checkpoint.config("unet").get("_name_or_path"))
    table = {name.lower(): entry for name, entry in MODELS.items()}
    return next((table[name] for name in map(str.lower, map(str, names)) if name in table), Known())


def _own(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The checkpoint's generation_config.json, as far as it speaks of what is a default here."""
    path = checkpoint.folder / "generation_config.json"
    content: dict[str, Any] = read_json(path) if path.is_file() else {}
    found = {key: value for key, value in content.items() if key in KEYS}
    for key, value in found.items():
        if key != "strength_cuts" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise CheckpointError(f"{path}: {key} is {value!r}, not a number")
    return found
