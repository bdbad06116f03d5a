"""What a bundle can do, read from its manifest alone."""

from __future__ import annotations

from typing import Any

from sdopt.bundle.adapter import CONTROLLED, IMAGE_PROMPTED
from sdopt.bundle.decode import encode
from sdopt.bundle.files import Bundle
from sdopt.request.kinds import MAX_IMAGES, MAX_SIZE
from sdopt.text.encode import extra_widths


def capabilities(bundle: Bundle) -> dict[str, Any]:
    """Tasks, defaults and limits by name.

    `inpaint`: how inpainting is done: any UNet's result is blended after each step, or the UNet takes the mask.
    `embeddings`: the width of a textual inversion for each text encoder that takes them.
    `controlnets`, `ip_adapters`: whether such adapters can be added.
    `preview`: how closely the preview's colours match the decoder's.
    """
    manifest = bundle.manifest
    encoders, preview = manifest.conditioning.encoders, manifest.preview
    beside = [encoder for encoder in encoders if encoder.join == "features"]
    tasks, inpaint = _tasks(bundle)
    return {
        "family": manifest.family,
        "tasks": tasks,
        "inpaint": inpaint,
        "defaults": encode(manifest.defaults),
        "size_multiple": manifest.latents.pixels,
        "max_size": min(MAX_SIZE, manifest.latents.most * manifest.latents.factor or MAX_SIZE),
        "max_images": MAX_IMAGES,
        "tokens_per_chunk": min(manifest.tokenizers[encoder.tokenizer].max_length - 2 for encoder in encoders),
        "max_clip_skip": min((_skippable_layers(bundle, one.component) - one.skip for one in beside), default=0),
        "samplers": _samplers(bundle),
        "embeddings": {} if manifest.conditioning.sequence else extra_widths(bundle),
        "preview": {"r2": preview.r2, "psnr_db": preview.psnr_db} if preview else None,
        "float16_unsafe": list(manifest.float16_unsafe),
        "controlnets": CONTROLLED in bundle.components,
        "ip_adapters": IMAGE_PROMPTED in bundle.components,
        "verified": manifest.verified,
    }


def _tasks(bundle: Bundle) -> tuple[list[str], str | None]:
    """The tasks, and how inpainting is done; None if it cannot be done."""
    if "vae_encoder" not in bundle.components:
        return ["txt2img"], None
    latent_channels = bundle.manifest.latents.channels
    unet_channels = bundle.denoiser.inputs[0].shape[1]
    if unet_channels == latent_channels:
        return ["txt2img", "img2img", "inpaint"], f"{latent_channels} channels, blended after each step"
    return ["inpaint"], f"{unet_channels} channels, with the mask and the masked picture"


def _skippable_layers(bundle: Bundle, encoder: str) -> int:
    """How many layers of a text encoder can be left out: all, if it outputs the state after each; otherwise none."""
    states = [spec for spec in bundle.component(encoder).outputs if spec.name == "hidden_states"]
    return int(states[0].shape[1]) - 1 if states else 0


def _samplers(bundle: Bundle) -> str:
    name = bundle.manifest.scheduler["_class_name"]
    if bundle.manifest.sampler_tables is None:
        return f"{name}, or any that `sdopt samplers` lists"
    return f"{name} by its tables, without options; or any that `sdopt samplers` lists"
