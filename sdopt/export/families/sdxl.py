"""SDXL: base, refiner, inpainting, Turbo, latent consistency models, and smaller relatives such as SSD-1B."""

from __future__ import annotations

import torch

from sdopt.bundle.format import Conditioning, Encoder
from sdopt.bundle.specs import TensorSpec
from sdopt.export.blocks import lcm, text_encoder, unet, vae
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.families.contract import Family, PipelineClass, TracedComponent
from sdopt.export.part import Part
from sdopt.export.single_file import names

CLIP_TOKENIZERS = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # the refiner has only the second pair


class StatesEncoder(text_encoder.TextEncoder):
    """From token ids to the state after each layer, before the final norm."""

    def forward(self, input_ids: torch.Tensor, extra_embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.encode(input_ids, extra_embeddings)
        return (torch.stack(output.hidden_states, 1),)


class PooledEncoder(text_encoder.TextEncoder):
    """From token ids to the same states, and to the projection of the pooled state: `text_embeds`."""

    def forward(self, input_ids: torch.Tensor, extra_embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.encode(input_ids, extra_embeddings)
        return torch.stack(output.hidden_states, 1), output.text_embeds


def encoder_part(checkpoint: Checkpoint) -> Part:
    outputs = (text_encoder.states(checkpoint.config("text_encoder")),)
    unused = {"text_model.final_layer_norm.": "the states are given as they are before it"}
    return text_encoder.part(checkpoint, "text_encoder", StatesEncoder, outputs, unused)


def encoder_2_part(checkpoint: Checkpoint) -> Part:
    config = checkpoint.config("text_encoder_2")
    pooled = TensorSpec("text_embeds", "float32", ("batch", config["projection_dim"]))
    return text_encoder.part(checkpoint, "text_encoder_2", PooledEncoder, (text_encoder.states(config), pooled))


def conditioning(checkpoint: Checkpoint) -> Conditioning:
    """The penultimate states of both encoders, the pooled text, and sizes. The refiner's last size is a score."""
    index = checkpoint.index()
    last = "aesthetic_score" if index.get("requires_aesthetics_score") else "target_size"
    encoders = (Encoder(name, tokenizer, output="hidden_states", skip=1) for name, tokenizer in TOKENIZERS.items())
    return Conditioning(
        encoders=tuple(encoder for encoder in encoders if checkpoint.has(encoder.component)),
        pooled="text_encoder_2",
        time_ids=("original_size", "crops_coords_top_left", last),
        zeros_for_empty=index.get("force_zeros_for_empty_prompt", True),
        guidance_embedding=unet.guidance_embedding(checkpoint),
    )


def unet_part(checkpoint: Checkpoint) -> Part:
    return unet.part(checkpoint, conditioning(checkpoint))


def require_supported(checkpoint: Checkpoint) -> None:
    unet.require_supported(checkpoint, conditioning(checkpoint))
    vae.check(checkpoint)


def float16_unsafe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Both components of SDXL's VAE. None if `force_upcast` says that the VAE was repaired, and none for TAESD."""
    config = checkpoint.config("vae")
    return vae.COMPONENTS if config.get("force_upcast", not vae.is_tiny(config)) else ()


FAMILY = Family(
    name="sdxl",
    pipelines={
        "StableDiffusionXLPipeline": PipelineClass(),
        "StableDiffusionXLImg2ImgPipeline": PipelineClass(),
        "StableDiffusionXLInpaintPipeline": PipelineClass(defaults={"guidance_scale": 7.5}),
    },
    models={
        "text_encoder": ("transformers.CLIPTextModel",),
        "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
        "unet": ("diffusers.UNet2DConditionModel",),
        "vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny"),
    },
    tokenizers=dict.fromkeys(TOKENIZERS.values(), CLIP_TOKENIZERS),
    optional=("text_encoder", "tokenizer"),
    not_used=("safety_checker", "feature_extractor", "image_encoder"),
    denoiser="unet",
    single_file={
        "text_encoder": names.text_encoders("conditioner.embedders.0"),
        # the refiner's only text encoder is the second of the base
        "text_encoder_2": (
            *names.text_encoders("conditioner.embedders.1"),
            *names.text_encoders("conditioner.embedders.0"),
        ),
        "unet": names.UNETS,
        "vae": names.VAES,
    },
    require_supported=require_supported,
    components={
        "text_encoder": TracedComponent("text_encoder", encoder_part),
        "text_encoder_2": TracedComponent("text_encoder_2", encoder_2_part),
        "unet": TracedComponent("unet", unet_part),
        "vae_decoder": TracedComponent("vae", vae.decoder),
        "vae_encoder": TracedComponent("vae", vae.encoder),
    },
    conditioning=conditioning,
    float16_unsafe=float16_unsafe,
    float16_attention_unsafe=unet.float16_attention_unsafe,
    # the defaults of the pipelines' arguments in diffusers 0.42; in image to image, strength leaves out steps
    defaults={
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "strength": 0.3,
        "inpaint_strength": 0.9999,
        "strength_cuts": "steps",
    },
    schedulers=lcm.SCHEDULERS,
    guidance_embedding=lcm.GUIDANCE_EMBEDDING,
    named_models={
        "stabilityai/sdxl-turbo": {"num_inference_steps": 1, "guidance_scale": 0.0},
        "latent-consistency/lcm-sdxl": {"num_inference_steps": 4, "guidance_scale": 8.0},
        "latent-consistency/lcm-ssd-1b": {"num_inference_steps": 4, "guidance_scale": 8.0},
        "segmind/SSD-1B": {"guidance_scale": 9.0},
        "segmind/Segmind-Vega": {"guidance_scale": 9.0},
    },
)
