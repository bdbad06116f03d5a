"""Full-size pipelines with random weights, from their public configurations: every figure can be made offline.

    python benchmarks/models.py sd15                      checkpoint and bundle, made once, in build-out/models/sd15
    python benchmarks/models.py sd15 -o CHECKPOINT [--dtype float16]
    python benchmarks/models.py taesd -o FOLDER           the tiny autoencoder, for `sdopt export FOLDER --onto BUNDLE`

Speed does not depend on the values of the weights; parity is measured on what is run. The tokenizer has the size
of CLIP's (49,408) and its byte-level scheme, but made-up merges: CLIP's vocabulary cannot be had offline.
Configurations: stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1,
stabilityai/stable-diffusion-xl-base-1.0 and stabilityai/sdxl-turbo on the hub; Rombach et al. 2022, arXiv:2112.10752;
Podell et al. 2023, arXiv:2307.01952; Sauer et al. 2023, arXiv:2311.17042.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path("build-out/models")
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip
CLIP_H = CLIP_L | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu", "projection_dim": 512, "pad_token_id": 0,
}  # fmt: skip
CLIP_G = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280, "pad_token_id": 0,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SD15: dict[str, dict[str, Any]] = {
    "text_encoder": CLIP_L,
    "unet": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
    "scheduler": BETAS | {"class": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
}  # fmt: skip
SD21 = SD15 | {
    "text_encoder": CLIP_H,
    "unet": SD15["unet"] | {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True, "upcast_attention": True,
    },
    "vae": VAE | {"sample_size": 768, "scaling_factor": 0.18215},
    "scheduler": BETAS | {
        "class": "DDIMScheduler", "prediction_type": "v_prediction", "set_alpha_to_one": False, "clip_sample": False,
    },
}  # fmt: skip
SDXL: dict[str, dict[str, Any]] = {
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "unet": {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "scheduler": BETAS | {"class": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
}  # fmt: skip
TURBO = SDXL | {
    "unet": SDXL["unet"] | {"sample_size": 64},
    "scheduler": BETAS | {"class": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "generation_config": {"num_inference_steps": 1, "guidance_scale": 0.0},
}
TINY = "taesd"  # madebyollin/taesd: diffusers' AutoencoderTiny as it stands there
MODELS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "sdxl-turbo": TURBO}


def byte_tokens() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's tokenizers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = itertools.count(256)
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def tokenizer(size: int, length: int, pad: int) -> Any:
    """A CLIP tokenizer of the given vocabulary size, with made-up merges, padded with the token of that id."""
    from transformers import CLIPTokenizer

    single = byte_tokens()
    merges = list(itertools.islice(itertools.product(single, single), size - 514))
    words = [*single, *(f"{t}</w>" for t in single), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {w: i for i, w in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, pad_token=words[pad])


def random_model(make: Callable[[], Any], dtype: Any) -> Any:
    """A model with random weights that were never in memory but in `dtype`: as torch begins them, norms at 1."""
    import torch

    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=(3 * weight[0].numel()) ** -0.5)
            else:
                weight.fill_(float(name.endswith("weight")))
    return model


def build(name: str, folder: Path, dtype: str = "float16", seed: int = 0) -> Path:
    """The checkpoint of a model of `MODELS` in diffusers format."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config, kind = MODELS[name], getattr(torch, dtype)
    torch.manual_seed(seed)
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    parts: dict[str, Any] = {}
    for encoder in classes.keys() & config.keys():
        text = CLIPTextConfig(**config[encoder])
        parts[encoder] = random_model(lambda: classes[encoder](text), kind)  # noqa: B023
        words = tokenizer(text.vocab_size, text.max_position_embeddings, text.pad_token_id)
        parts[encoder.replace("text_encoder", "tokenizer")] = words
    parts["unet"] = random_model(lambda: diffusers.UNet2DConditionModel(**config["unet"]), kind)
    parts["vae"] = random_model(lambda: diffusers.AutoencoderKL(**config["vae"]), kind)
    options = dict(config["scheduler"])
    parts["scheduler"] = getattr(diffusers, options.pop("class"))(**options)
    if "text_encoder_2" in parts:
        diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(folder)
    else:
        unfiltered = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        diffusers.StableDiffusionPipeline(**parts, **unfiltered).save_pretrained(folder)
    _name_as_published(folder / "text_encoder/model.safetensors")
    if "generation_config" in config:
        (folder / "generation_config.json").write_text(json.dumps(config["generation_config"]))
    return folder


def build_tiny(folder: Path, dtype: str = "float16", seed: int = 0) -> Path:
    """The checkpoint of a tiny autoencoder for Stable Diffusion 1 and 2."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    random_model(AutoencoderTiny, getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _name_as_published(weights: Path) -> None:
    """Give CLIP's weights the prefix that published checkpoints have, and that stable-diffusion.cpp looks for."""
    from safetensors.torch import load_file, save_file

    named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(named, weights, {"format": "pt"})


def prepared(name: str, cache: Path = CACHE) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a model, each made where it is not there yet."""
    from sdopt.bundle.write import new_folder
    from sdopt.export import export

    checkpoint, bundle = cache / name / "checkpoint", cache / name / "bundle"
    if not checkpoint.exists():
        with new_folder(checkpoint) as folder:
            build(name, folder)
    if not bundle.exists():
        export(checkpoint, bundle, report=lambda line: print(line, file=sys.stderr, flush=True))
    return checkpoint, bundle


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=[*MODELS, TINY])
    parser.add_argument("-o", "--output", type=Path, help="make only the checkpoint, here")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    if args.model == TINY:
        if args.output is None:
            parser.error(f"say where: python benchmarks/models.py {TINY} -o FOLDER")
        print(build_tiny(args.output, args.dtype))
    elif args.output:
        print(build(args.model, args.output, args.dtype))
    else:
        print(*prepared(args.model, args.cache), sep="\n")
