"""The text by which AUTOMATIC1111's web UI makes a picture again: prompt, negative prompt, and one line of pairs.

Ref: AUTOMATIC1111/stable-diffusion-webui, modules/processing.py, create_infotext; modules/infotext_utils.py reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sdopt.bundle.format import DENOISERS

NEGATIVE = "Negative prompt:"
PAIR = re.compile(r'\s*([\w ()/-]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
FEWEST_PAIRS = 3  # of the last line; with fewer it belongs to a prompt


def a1111_text(parameters: Mapping[str, Any]) -> str:
    """The `parameters` text of a picture. A key is left out where the web UI has no word for what was done."""
    tags = [_tag(lora) for lora in parameters.get("loras", ())]
    lines = [" ".join([parameters["prompt"], *tags])]
    if parameters.get("negative_prompt"):
        lines.append(f"{NEGATIVE} {parameters['negative_prompt']}")
    pairs = {key: value for key, value in _pairs(parameters).items() if value not in (None, "")}
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items()))
    return "\n".join(lines)


def parsed(text: str) -> dict[str, str]:
    """The values in such a text, by the web UI's names; "Size" is also "Size-1" and "Size-2"."""
    lines = text.strip().split("\n")
    pairs = PAIR.findall(lines[-1])
    if len(pairs) < FEWEST_PAIRS:
        pairs = []
    else:
        lines = lines[:-1]
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).strip().removeprefix(NEGATIVE).strip()
    values = {"Prompt": "\n".join(lines[:start]).strip(), "Negative prompt": negative}
    for key, value in pairs:
        values[key.strip()] = _unquoted(value.strip())
        size = re.fullmatch(r"(\d+)x(\d+)", value.strip())
        if size:
            values |= {f"{key.strip()}-1": size[1], f"{key.strip()}-2": size[2]}
    return values if text.strip() else {}


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def _pairs(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of the last line, in the web UI's order. None and an empty text are left out."""
    get, scale = parameters.get, parameters["guidance_scale"]
    return {
        "Steps": parameters["num_inference_steps"],
        "Sampler": parameters["sampled_by"],
        "Schedule type": get("schedule_type", "Automatic"),
        "CFG scale": None if isinstance(scale, list) else scale,  # one for each call has no word
        "Seed": parameters["seed"],
        "Size": f"{parameters['width']}x{parameters['height']}",
        "Model": parameters["model"],
        "VAE": get("vae"),
        "Denoising strength": get("hires_strength", get("strength")),
        "Clip skip": get("clip_skip", 0) + 1 if get("clip_skip") else None,  # it counts the last layer too
        "Hires upscale": get("hires"),
        "Hires steps": get("hires_calls"),  # it makes so many, whatever the strength is
        "Hires upscaler": "Latent" if get("hires") else None,
        "RNG": _generator(str(parameters["rng"])),
        "Mask blur": get("mask_blur"),
        "Inpaint area": "Only masked" if get("padding_mask_crop") is not None else None,
        "Masked area padding": get("padding_mask_crop"),
        "Eta DDIM": get("eta") if parameters["sampled_by"] == "DDIM" else None,
        "Emphasis": "None" if _is_literal(parameters) else None,
        "Lora hashes": ", ".join(f"{lora['name']}: {lora['a1111_hash']}" for lora in get("loras", ())),
        "Version": f"sdopt {parameters['version']}",
    }


def _tag(lora: Mapping[str, Any]) -> str:
    """The web UI names its LoRAs in the prompt: the weight of the text encoders, then that of the denoiser."""
    weights: Mapping[str, float] = lora["weights"]
    unet = next(weight for name, weight in weights.items() if name in DENOISERS)
    text_encoder = next((weight for name, weight in weights.items() if name not in DENOISERS), unet)
    both = f"{unet:g}" if text_encoder == unet else f"{text_encoder:g}:{unet:g}"
    return f"<lora:{lora['name']}:{both}>"


def _generator(rng: str) -> str:
    """The web UI's word for a generator of noise. Its "NV" draws on every machine what NVIDIA's GPUs draw."""
    return "NV" if rng.partition(":")[0] == "cuda" else rng.upper()


def _is_literal(parameters: Mapping[str, Any]) -> bool:
    """Whether the prompts have brackets that were read as text. The web UI would read them as weights."""
    texts = (parameters["prompt"], parameters.get("negative_prompt") or "")
    return parameters.get("prompt_style") == "plain" and any(set("()[]\\") & set(text) for text in texts)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:\n"') else value
