"""Stable Diffusion 3 and 3.5: two CLIP encoders side by side, T5 behind them or not, and a transformer."""

from __future__ import annotations

from typing import Any, cast

import torch

from sdopt.bundle.format import TRANSFORMER, Conditioning, Encoder, Latents
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export.blocks import t5, text_encoder, transformer, vae
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.families.contract import Family, PipelineClass, TracedComponent
from sdopt.export.families.sdxl import CLIP_TOKENIZERS, PooledEncoder
from sdopt.export.part import Part
from sdopt.export.single_file import names

CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
T5, SEQUENCE = "text_encoder_3", 256  # tokens, by default


class Transformer(torch.nn.Module):
    """A noisy sample, its timestep, the text and the pooled text to the direction of the flow."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
    ) -> torch.Tensor:
        return self.model(sample, encoder_hidden_states, text_embeds, timestep, return_dict=False)[0]


def clip_part(checkpoint: Checkpoint, name: str) -> Part:
    config = checkpoint.config(name)
    pooled = TensorSpec("text_embeds", "float32", ("batch", config["projection_dim"]))
    return text_encoder.part(checkpoint, name, PooledEncoder, (text_encoder.states(config), pooled))


def conditioning(checkpoint: Checkpoint) -> Conditioning:
    clips = (Encoder(name, tokenizer, output="hidden_states", skip=1) for name, tokenizer in CLIPS.items())
    last = (Encoder(T5, "tokenizer_3", output="last_hidden_state", skip=0, join="tokens"),)
    return Conditioning(
        encoders=(*clips, *(last if checkpoint.has(T5) else ())),
        pooled=tuple(CLIPS),
        time_ids=(),
        zeros_for_empty=False,
        guidance_embedding=0,
        sequence=SEQUENCE,
    )


def shape(checkpoint: Checkpoint) -> transformer.Shape:
    config = checkpoint.config(TRANSFORMER)
    return transformer.Shape(
        channels=config["in_channels"],
        text=config["joint_attention_dim"],
        pooled=config["pooled_projection_dim"],
        patch=config["patch_size"],
    )


def latents(checkpoint: Checkpoint) -> Latents:
    patch = shape(checkpoint).patch
    return transformer.latents(checkpoint, patch, patch * checkpoint.config(TRANSFORMER)["pos_embed_max_size"])


def transformer_part(checkpoint: Checkpoint) -> Part:
    model, weights = checkpoint.opened(TRANSFORMER)
    return transformer.part(Transformer(model), shape(checkpoint), weights)


def require_supported(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError that names the key of what is not exported."""
    config, where = checkpoint.config(TRANSFORMER), checkpoint.folder / TRANSFORMER
    out = cast("int | None", config["out_channels"])
    if out not in (None, config["in_channels"]):
        raise CheckpointError(f"{where}: out_channels is {out}: it must give as many as it takes")
    pooled = sum(checkpoint.config(name)["projection_dim"] for name in CLIPS)
    text = checkpoint.config(T5)["d_model"] if checkpoint.has(T5) else 0
    transformer.require_fit(checkpoint, shape(checkpoint), conditioning(checkpoint), pooled, text)
    beside = sum(checkpoint.config(name)["hidden_size"] for name in CLIPS)
    if beside > config["joint_attention_dim"]:
        raise CheckpointError(
            f"{where}: joint_attention_dim is {config['joint_attention_dim']}: its CLIP encoders give {beside} features"
        )
    model = Transformer(checkpoint.skeleton(TRANSFORMER))
    transformer.require_run(checkpoint, transformer.part(model, shape(checkpoint)))
    vae.check(checkpoint)


def float16_unsafe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """T5, whose last layer of each block leaves the range of fp16: transformers keeps it in float32."""
    return (T5,) if checkpoint.has(T5) else ()


FROM_PICTURES = PipelineClass(defaults={"num_inference_steps": 50})

FAMILY = Family(
    name="sd3",
    pipelines={
        "StableDiffusion3Pipeline": PipelineClass(),
        "StableDiffusion3Img2ImgPipeline": FROM_PICTURES,
        "StableDiffusion3InpaintPipeline": FROM_PICTURES,
    },
    models={
        "text_encoder": ("transformers.CLIPTextModelWithProjection",),
        "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
        T5: ("transformers.T5EncoderModel",),
        TRANSFORMER: ("diffusers.SD3Transformer2DModel",),
        "vae": ("diffusers.AutoencoderKL",),
    },
    tokenizers={
        **dict.fromkeys(CLIPS.values(), CLIP_TOKENIZERS),
        "tokenizer_3": ("transformers.T5TokenizerFast", "transformers.T5Tokenizer"),
    },
    optional=(T5, "tokenizer_3"),
    not_used=("image_encoder", "feature_extractor"),
    denoiser=TRANSFORMER,
    single_file={
        "text_encoder": names.CLIP_L,
        "text_encoder_2": names.CLIP_G,
        T5: names.T5S,
        TRANSFORMER: names.TRANSFORMERS,
        "vae": names.VAES,
    },
    require_supported=require_supported,
    components={
        "text_encoder": TracedComponent("text_encoder", lambda checkpoint: clip_part(checkpoint, "text_encoder")),
        "text_encoder_2": TracedComponent("text_encoder_2", lambda checkpoint: clip_part(checkpoint, "text_encoder_2")),
        T5: TracedComponent(T5, lambda checkpoint: t5.part(checkpoint, T5)),
        TRANSFORMER: TracedComponent(TRANSFORMER, transformer_part),
        "vae_decoder": TracedComponent("vae", vae.decoder),
        "vae_encoder": TracedComponent("vae", vae.encoder),
    },
    conditioning=conditioning,
    latents=latents,
    float16_unsafe=float16_unsafe,
    # the defaults of the pipelines' arguments in diffusers 0.42; a strength does a part of a step too
    defaults={
        "num_inference_steps": 28,
        "guidance_scale": 7.0,
        "strength": 0.6,
        "inpaint_strength": 0.6,
        "strength_cuts": "steps_up",
    },
    named_models={"stabilityai/stable-diffusion-3.5-large-turbo": {"num_inference_steps": 4, "guidance_scale": 0.0}},
)
