"""Stable Diffusion 1 and 2, their inpainting models, Turbo, and latent consistency models made of them."""

from __future__ import annotations

import torch

from sdopt.bundle.format import Conditioning, Encoder
from sdopt.bundle.specs import TensorSpec
from sdopt.export.blocks import lcm, text_encoder, unet, vae
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.families.contract import Family, PipelineClass, TracedComponent
from sdopt.export.part import Part
from sdopt.export.single_file import names


class StateEncoder(text_encoder.TextEncoder):
    """From token ids to the last hidden state, and to the normalised state after each layer (for `clip_skip`)."""

    def forward(
        self, input_ids: torch.Tensor, extra_embeddings: torch.Tensor, end_position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.encode(input_ids, extra_embeddings, end_position)
        norm = getattr(self.model, "text_model", self.model).final_layer_norm  # transformers 5.6 dropped the wrapper
        return output.last_hidden_state, norm(torch.stack(output.hidden_states, 1))


def encoder_part(checkpoint: Checkpoint) -> Part:
    config = checkpoint.config("text_encoder")
    last = TensorSpec("last_hidden_state", "float32", ("batch", "tokens", config["hidden_size"]))
    outputs = (last, text_encoder.states(config))
    return text_encoder.part(checkpoint, "text_encoder", StateEncoder, outputs, may_mask=True)


def conditioning(checkpoint: Checkpoint) -> Conditioning:
    return Conditioning(
        encoders=(Encoder("text_encoder", "tokenizer", output="last_hidden_state", skip=0),),
        pooled=None,
        time_ids=(),
        zeros_for_empty=False,
        guidance_embedding=unet.guidance_embedding(checkpoint),
    )


def unet_part(checkpoint: Checkpoint) -> Part:
    return unet.part(checkpoint, conditioning(checkpoint))


def require_supported(checkpoint: Checkpoint) -> None:
    unet.require_supported(checkpoint, conditioning(checkpoint))
    vae.check(checkpoint)


# StableDiffusion*Pipeline sets these options in every scheduler, because old configurations have wrong values
STABLE_DIFFUSION = PipelineClass(scheduler_corrections={"steps_offset": 1, "clip_sample": False}, corrects_size=True)
# the inpainting pipeline leaves clip_sample as it is
INPAINT = PipelineClass(scheduler_corrections={"steps_offset": 1, "skip_prk_steps": True}, corrects_size=True)
LATENT_CONSISTENCY = PipelineClass(defaults=lcm.PIPELINE)

FAMILY = Family(
    name="sd",
    pipelines={
        "StableDiffusionPipeline": STABLE_DIFFUSION,
        "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
        "StableDiffusionInpaintPipeline": INPAINT,
        "LatentConsistencyModelPipeline": LATENT_CONSISTENCY,
        "LatentConsistencyModelImg2ImgPipeline": LATENT_CONSISTENCY,
    },
    models={
        "text_encoder": ("transformers.CLIPTextModel",),
        "unet": ("diffusers.UNet2DConditionModel",),
        "vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny"),
    },
    tokenizers={"tokenizer": ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")},
    not_used=("safety_checker", "feature_extractor", "image_encoder"),
    denoiser="unet",
    single_file={
        "text_encoder": names.text_encoders("cond_stage_model"),
        "unet": names.UNETS,
        "vae": names.VAES,
    },
    require_supported=require_supported,
    components={
        "text_encoder": TracedComponent("text_encoder", encoder_part),
        "unet": TracedComponent("unet", unet_part),
        "vae_decoder": TracedComponent("vae", vae.decoder),
        "vae_encoder": TracedComponent("vae", vae.encoder),
    },
    conditioning=conditioning,
    latents=vae.scaled_latents,
    float16_attention_unsafe=unet.float16_attention_unsafe,
    has_safety_checker=True,
    # the defaults of the pipelines' arguments in diffusers 0.42; in image to image, strength leaves out steps
    defaults={
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "strength": 0.8,
        "inpaint_strength": 1.0,
        "strength_cuts": "steps",
    },
    schedulers=lcm.SCHEDULERS,
    guidance_embedding=lcm.GUIDANCE_EMBEDDING,
    named_models={
        "stabilityai/sd-turbo": {"num_inference_steps": 1, "guidance_scale": 0.0},
        "SimianLuo/LCM_Dreamshaper_v7": {"num_inference_steps": 4, "guidance_scale": 8.0},
    },
)
