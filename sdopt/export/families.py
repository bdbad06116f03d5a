"""What sets one family, or one model, apart from another, as the manifest tells it to the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdopt.bundle.format import Conditioning, Encoder, Latents
from sdopt.export.source import Checkpoint


def conditioning(checkpoint: Checkpoint) -> Conditioning:
    """How a family's texts condition its UNet, for the manifest.

    `encoders`: their outputs stand side by side in the features of `encoder_hidden_states`; `skip` layers are left out.
    `pooled`: the encoder whose `text_embeds` the UNet takes. `time_ids`: the numbers that it takes, by their argument.
    `zeros_for_empty`: without a negative prompt the unconditional half is zeros, not the empty prompt.
    `guidance_embedding`: the width of `timestep_cond`, by which the UNet is told the guidance scale; 0 without it.
    """
    embedding = checkpoint.config("unet").get("time_cond_proj_dim") or 0
    if checkpoint.family == "sd":
        encoder = Encoder("text_encoder", "tokenizer", output="last_hidden_state", skip=0)
        return Conditioning((encoder,), None, (), zeros_for_empty=False, guidance_embedding=embedding)
    pairs = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    index = checkpoint.index()
    last = "aesthetic_score" if index.get("requires_aesthetics_score") else "target_size"
    return Conditioning(
        encoders=tuple(Encoder(c, t, output="hidden_states", skip=1) for c, t in pairs if checkpoint.has(c)),
        pooled="text_encoder_2",
        time_ids=("original_size", "crops_coords_top_left", last),
        zeros_for_empty=index.get("force_zeros_for_empty_prompt", True),
        guidance_embedding=embedding,
    )


def is_tiny(vae: Mapping[str, Any]) -> bool:
    """Whether a VAE's configuration is that of TAESD, which has no posterior. Ref: github.com/madebyollin/taesd."""
    return vae.get("_class_name") == "AutoencoderTiny"


def vae_factor(config: Mapping[str, Any]) -> int:
    """How many pixels a latent spans: each block of the VAE but the last halves the picture."""
    return 2 ** (len(config.get("block_out_channels") or config["decoder_block_out_channels"]) - 1)


def latents(checkpoint: Checkpoint) -> Latents:
    """How the VAE's latents become the UNet's, for the manifest; a factor for all channels, or one for each."""
    vae = checkpoint.config("vae")
    scale, shift = vae.get("scaling_factor", 1.0 if is_tiny(vae) else 0.18215), vae.get("shift_factor") or 0.0
    if vae.get("latents_mean") and vae.get("latents_std"):
        scale, shift = tuple(scale / std for std in vae["latents_std"]), tuple(vae["latents_mean"])
    return Latents(vae["latent_channels"], vae_factor(vae), scaling_factor=scale, shift_factor=shift)


def float16_unsafe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The components that overflow in half precision: SDXL's VAE, unless its `force_upcast` says otherwise."""
    vae = checkpoint.config("vae")
    unsafe = checkpoint.family == "sdxl" and vae.get("force_upcast", not is_tiny(vae))
    return ("vae_decoder", "vae_encoder") if unsafe else ()


def float16_attention_unsafe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The components whose attention overflows in half precision: the UNet of SD 2.1, which says so itself."""
    return ("unet",) if checkpoint.config("unet").get("upcast_attention") else ()
