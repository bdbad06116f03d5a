"""What a bundle can do, told from its manifest alone."""

from __future__ import annotations

from typing import Any

from sdopt.bundle.decode import encode
from sdopt.bundle.files import Bundle
from sdopt.request.kinds import MAX_IMAGES, MAX_SIZE
from sdopt.text.encode import extra_widths


def capabilities(bundle: Bundle) -> dict[str, Any]:
    """Tasks, defaults and limits by name.

    `inpaint`: by a blend after each step (any UNet), or by a UNet that takes the mask. `embeddings`: the width of a
    textual inversion for each text encoder that takes them. `preview`: how well latents become colours.
    """
    manifest = bundle.manifest
    encoders, preview = manifest.conditioning.encoders, manifest.preview
    tasks, inpaint = _tasks(bundle)
    return {
        "family": manifest.family,
        "tasks": tasks,
        "inpaint": inpaint,
        "defaults": encode(manifest.defaults),
        "size_multiple": manifest.latents.factor,
        "max_size": MAX_SIZE,
        "max_images": MAX_IMAGES,
        "tokens_per_chunk": min(manifest.tokenizers[e.tokenizer].max_length - 2 for e in encoders),
        "max_clip_skip": min(_layers(bundle, e.component) - e.skip for e in encoders),
        "samplers": _samplers(bundle),
        "embeddings": extra_widths(bundle),
        "preview": {"r2": preview.r2, "psnr_db": preview.psnr_db} if preview else None,
        "float16_unsafe": list(manifest.float16_unsafe),
        "verified": manifest.verified,
    }


def _tasks(bundle: Bundle) -> tuple[list[str], str | None]:
    """The tasks, and how inpainting is done."""
    latents, channels = bundle.manifest.latents.channels, bundle.component("unet").inputs[0].shape[1]
    if "vae_encoder" not in bundle.components:
        return ["txt2img"], None
    if channels == latents:
        return ["txt2img", "img2img", "inpaint"], f"{latents} channels, blended after each step"
    return ["inpaint"], f"{channels} channels, with the mask and the masked picture"


def _layers(bundle: Bundle, encoder: str) -> int:
    """How many layers of a text encoder can be left out: all of them, if it gives the state after each."""
    states = [spec for spec in bundle.component(encoder).outputs if spec.name == "hidden_states"]
    return int(states[0].shape[1]) - 1 if states else 0


def _samplers(bundle: Bundle) -> str:
    name = bundle.manifest.scheduler["_class_name"]
    if bundle.manifest.sampler_tables is None:
        return f"{name}, or any that `sdopt samplers` lists"
    return f"{name} by its tables, without options; or any that `sdopt samplers` lists"
