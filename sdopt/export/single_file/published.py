"""The configurations of published models, for files that hold none.

Each is that of the model's folder on the hub, whose id stands beside it. What a configuration leaves out is the
default of its class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from sdopt.dataclass import dataclass
from sdopt.export.single_file import clip

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """One published model. `tokenizers`: the word that pads the prompts of each."""

    title: str
    index: Config
    models: Mapping[str, Config]
    scheduler: Config
    tokenizers: Mapping[str, str] = field(default_factory=dict[str, str])

    def write(self, folder: Path) -> None:
        """Write the configurations as a diffusers folder without weights."""
        configs = {f"{name}/config.json": config for name, config in self.models.items()}
        configs |= {"model_index.json": self.index, "scheduler/scheduler_config.json": self.scheduler}
        for name, config in configs.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config, indent=2), encoding="utf-8")
        for name, pad in self.tokenizers.items():
            clip.write_tokenizer(folder / name, pad)


# --- the models

CROSS = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*CROSS[0], "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *CROSS[1]],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_2 = {
    **UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
UNET_XL = {
    **UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", *CROSS[0][1:]],
    "up_block_types": [*CROSS[1][1:], "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNET_REFINER = {
    **UNET_XL,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", *CROSS[0][1:], "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *CROSS[1][1:], "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "projection_class_embeddings_input_dim": 2560,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
CLIP = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": clip.TOKENS,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
OPEN_CLIP = {
    **CLIP,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
OPEN_CLIP_BIG = {
    **CLIP,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

# --- the schedulers

LEVELS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PNDM = {"_class_name": "PNDMScheduler", **LEVELS, "skip_prk_steps": True}
DDIM = {"_class_name": "DDIMScheduler", **LEVELS}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **LEVELS,
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
LCM = {"_class_name": "LCMScheduler", **LEVELS, "original_inference_steps": 50, "timestep_scaling": 10.0}

# --- the pipelines


def _sd(title: str, unet: Config, scheduler: Config, pipeline: str = "StableDiffusionPipeline") -> Published:
    is_first = unet["cross_attention_dim"] == UNET["cross_attention_dim"]
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "requires_safety_checker": is_first,
    }
    vae = {**VAE, "sample_size": 8 * unet["sample_size"]}
    models = {"text_encoder": CLIP if is_first else OPEN_CLIP, "unet": unet, "vae": vae}
    return Published(title, index, models, scheduler, {"tokenizer": clip.END if is_first else "!"})


def _xl(title: str, unet: Config, scheduler: Config = EULER, pipeline: str = "StableDiffusionXLPipeline") -> Published:
    index = {
        "_class_name": pipeline,
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    models = {"text_encoder": CLIP, "text_encoder_2": OPEN_CLIP_BIG, "unet": unet, "vae": VAE_XL}
    return Published(title, index, models, scheduler, {"tokenizer": clip.END, "tokenizer_2": "!"})


def _refiner() -> Published:
    base = _xl("SDXL's refiner", UNET_REFINER, EULER, "StableDiffusionXLImg2ImgPipeline")
    own = {"text_encoder": [None, None], "tokenizer": [None, None], "force_zeros_for_empty_prompt": False}
    models = {name: config for name, config in base.models.items() if name != "text_encoder"}
    index = {**base.index, **own, "requires_aesthetics_score": True}
    return Published(base.title, index, models, base.scheduler, {"tokenizer_2": "!"})


INPAINTING = {"in_channels": 9}
GUIDED = {"time_cond_proj_dim": 256}  # LCM: the guidance scale is an input
VELOCITY = {"prediction_type": "v_prediction"}

PUBLISHED: Mapping[str, Published] = {
    # stable-diffusion-v1-5/stable-diffusion-v1-5
    "sd1": _sd("Stable Diffusion 1", UNET, PNDM),
    # stable-diffusion-v1-5/stable-diffusion-inpainting
    "sd1-inpaint": _sd(
        "Stable Diffusion 1, inpainting", {**UNET, **INPAINTING}, DDIM, "StableDiffusionInpaintPipeline"
    ),
    # SimianLuo/LCM_Dreamshaper_v7
    "sd1-lcm": _sd("LCM of Stable Diffusion 1", {**UNET, **GUIDED}, LCM, "LatentConsistencyModelPipeline"),
    # stabilityai/stable-diffusion-2-1
    "sd2": _sd(
        "Stable Diffusion 2, v-prediction, 768 x 768", {**UNET_2, "sample_size": 96}, {**DDIM, **VELOCITY}
    ),
    # stabilityai/stable-diffusion-2-1-base
    "sd2-base": _sd("Stable Diffusion 2 base, 512 x 512", UNET_2, PNDM),
    # stabilityai/stable-diffusion-2-inpainting
    "sd2-inpaint": _sd(
        "Stable Diffusion 2, inpainting", {**UNET_2, **INPAINTING}, PNDM, "StableDiffusionInpaintPipeline"
    ),
    # stabilityai/stable-diffusion-xl-base-1.0
    "sdxl-base": _xl("SDXL base", UNET_XL),
    # diffusers/stable-diffusion-xl-1.0-inpainting-0.1
    "sdxl-inpaint": _xl(
        "SDXL, inpainting", {**UNET_XL, **INPAINTING}, EULER, "StableDiffusionXLInpaintPipeline"
    ),
    # latent-consistency/lcm-sdxl
    "sdxl-lcm": _xl("LCM of SDXL", {**UNET_XL, **GUIDED}, LCM),
    # stabilityai/stable-diffusion-xl-refiner-1.0
    "sdxl-refiner": _refiner(),
}  # fmt: skip
