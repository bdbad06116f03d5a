"""Flux.1, dev and schnell: CLIP's pooled text, T5's sequence, and a transformer of packed latents.

Packing, the places of tokens and their rotary embeddings are inside of the graph, which takes latents as any denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.nn import functional

from sdopt.bundle.format import MAX_EDGE, TRANSFORMER, Conditioning, Encoder, Latents
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export.blocks import t5, text_encoder, transformer, vae
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.families.contract import Family, PipelineClass, TracedComponent
from sdopt.export.families.sdxl import CLIP_TOKENIZERS
from sdopt.export.file_weights import FileWeights
from sdopt.export.part import Part
from sdopt.export.single_file import names

T5, SEQUENCE = "text_encoder_2", 512  # tokens, by default
PATCH = 2  # latents of a token on a side: the pipeline packs them into channels


class ClipEncoder(text_encoder.TextEncoder):
    """From token ids to the pooled text alone: the last state of the end token, after the final norm."""

    def forward(self, input_ids: torch.Tensor, extra_embeddings: torch.Tensor) -> torch.Tensor:
        return self.encode(input_ids, extra_embeddings).pooler_output


class Rotary(torch.nn.Module):
    """Rotary embeddings looked up in tables, which are computed in float64 as diffusers computes the embeddings.

    It takes the place of FluxPosEmbed: no engine has to compute in float64. Ref: Su et al. 2021, arXiv:2104.09864.
    """

    def __init__(self, axes: Sequence[int], theta: float, places: int) -> None:
        super().__init__()
        self.axes = len(axes)
        for i, width in enumerate(axes):
            even = torch.arange(0, width, 2, dtype=torch.float64)
            angles = torch.outer(torch.arange(places, dtype=torch.float64), 1 / theta ** (even / width))
            angles = angles.repeat_interleave(2, 1)
            self.register_buffer(f"cos_{i}", angles.cos().float())
            self.register_buffer(f"sin_{i}", angles.sin().float())

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cosines and sines, each [tokens, features of a head], of the places [tokens, axes]."""
        parts = [[getattr(self, f"{kind}_{i}")[ids[:, i]] for i in range(self.axes)] for kind in ("cos", "sin")]
        return tuple(torch.cat(part, 1) for part in parts)


class Transformer(torch.nn.Module):
    """A noisy sample, its timestep, T5's text, the pooled text and the guidance scale to the direction of the flow."""

    def __init__(self, model: Any, pixels: int) -> None:
        """`pixels`: those of one token on a side."""
        super().__init__()
        self.model = model
        model.pos_embed = Rotary(model.config.axes_dims_rope, model.pos_embed.theta, MAX_EDGE // pixels)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        packed = functional.pixel_unshuffle(sample, PATCH)
        height, width = packed.shape[2:]
        rows = torch.arange(height)[:, None].expand(height, width).flatten()
        columns = torch.arange(width)[None].expand(height, width).flatten()
        predicted = self.model(
            packed.flatten(2).transpose(1, 2),
            encoder_hidden_states,
            text_embeds,
            timestep / 1000,
            img_ids=torch.stack([torch.zeros_like(rows), rows, columns], 1),
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, dtype=torch.int64),
            guidance=None if timestep_cond is None else timestep_cond[:, 0],
            return_dict=False,
        )[0]
        return functional.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), PATCH)


def clip_part(checkpoint: Checkpoint) -> Part:
    pooled = TensorSpec("text_embeds", "float32", ("batch", checkpoint.config("text_encoder")["hidden_size"]))
    return text_encoder.part(checkpoint, "text_encoder", ClipEncoder, (pooled,))


def conditioning(checkpoint: Checkpoint) -> Conditioning:
    return Conditioning(
        encoders=(
            Encoder("text_encoder", "tokenizer", output="last_hidden_state", skip=0, join="none"),
            Encoder(T5, "tokenizer_2", output="last_hidden_state", skip=0, join="tokens"),
        ),
        pooled="text_encoder",
        time_ids=(),
        zeros_for_empty=False,
        guidance_embedding=int(shape(checkpoint).guidance),
        sequence=SEQUENCE,
        true_guidance=True,
    )


def shape(checkpoint: Checkpoint) -> transformer.Shape:
    config = checkpoint.config(TRANSFORMER)
    return transformer.Shape(
        channels=config["in_channels"] // PATCH**2,
        text=config["joint_attention_dim"],
        pooled=config["pooled_projection_dim"],
        patch=PATCH,
        guidance=bool(config["guidance_embeds"]),
    )


def latents(checkpoint: Checkpoint) -> Latents:
    return transformer.latents(checkpoint, PATCH)


def transformer_part(checkpoint: Checkpoint) -> Part:
    return _part(checkpoint, *checkpoint.opened(TRANSFORMER))


def _part(checkpoint: Checkpoint, model: torch.nn.Module, weights: FileWeights | None = None) -> Part:
    return transformer.part(Transformer(model, latents(checkpoint).pixels), shape(checkpoint), weights)


def require_supported(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError that names the key of what is not exported."""
    config, where = checkpoint.config(TRANSFORMER), checkpoint.folder / TRANSFORMER
    out = cast("int | None", config["out_channels"])
    if config["patch_size"] != 1:
        raise CheckpointError(f"{where}: patch_size is {config['patch_size']}: what its pipeline packs has 1")
    if out not in (None, config["in_channels"]):
        raise CheckpointError(
            f"{where}: in_channels is {config['in_channels']} and out_channels {out}: a model that takes a picture "
            "beside the sample (Fill, Canny, Depth) is not exported"
        )
    pooled, text = checkpoint.config("text_encoder")["hidden_size"], checkpoint.config(T5)["d_model"]
    transformer.require_fit(checkpoint, shape(checkpoint), conditioning(checkpoint), pooled, text)
    transformer.require_run(checkpoint, _part(checkpoint, checkpoint.skeleton(TRANSFORMER)))
    vae.check(checkpoint)


def float16_unsafe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """T5, whose layers leave the range of fp16, and the transformer: diffusers cuts the states of its blocks off."""
    return (T5, TRANSFORMER)


FAMILY = Family(
    name="flux",
    pipelines={
        "FluxPipeline": PipelineClass(),
        "FluxImg2ImgPipeline": PipelineClass(),
        "FluxInpaintPipeline": PipelineClass(),
    },
    models={
        "text_encoder": ("transformers.CLIPTextModel",),
        T5: ("transformers.T5EncoderModel",),
        TRANSFORMER: ("diffusers.FluxTransformer2DModel",),
        "vae": ("diffusers.AutoencoderKL",),
    },
    tokenizers={
        "tokenizer": CLIP_TOKENIZERS,
        "tokenizer_2": ("transformers.T5TokenizerFast", "transformers.T5Tokenizer"),
    },
    not_used=("image_encoder", "feature_extractor"),
    denoiser=TRANSFORMER,
    single_file={
        "text_encoder": names.CLIP_L,
        T5: names.T5S,
        TRANSFORMER: names.TRANSFORMERS,
        "vae": names.VAES,
    },
    require_supported=require_supported,
    components={
        "text_encoder": TracedComponent("text_encoder", clip_part),
        T5: TracedComponent(T5, lambda checkpoint: t5.part(checkpoint, T5)),
        TRANSFORMER: TracedComponent(TRANSFORMER, transformer_part),
        "vae_decoder": TracedComponent("vae", vae.decoder),
        "vae_encoder": TracedComponent("vae", vae.encoder),
    },
    conditioning=conditioning,
    latents=latents,
    float16_unsafe=float16_unsafe,
    even_sigmas=True,
    # the defaults of FluxPipeline's arguments in diffusers 0.42; its default size is 1024 x 1024, whatever the model
    defaults={
        "height": 1024,
        "width": 1024,
        "num_inference_steps": 28,
        "guidance_scale": 0.0,  # of a model that takes none
        "strength": 0.6,
        "inpaint_strength": 0.6,
        "strength_cuts": "steps_up",
    },
    guidance_embedding={"guidance_scale": 3.5},
    named_models={"black-forest-labs/FLUX.1-schnell": {"num_inference_steps": 4}},
)
