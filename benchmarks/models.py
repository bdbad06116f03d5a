"""Full-size pipelines with random weights, from their public configurations: every figure can be made offline.

    python benchmarks/models.py sd15 -o CHECKPOINT [--dtype float16]

Speed does not depend on the values of the weights; parity is measured on what is run. The tokenizer has the size
of CLIP's (49,408) and its byte-level scheme, but made-up merges: CLIP's vocabulary cannot be had offline.
Configurations: stable-diffusion-v1-5/stable-diffusion-v1-5 on the hub; Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

SD15: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
        "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
    },
    "unet": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "vae": {
        "sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "scaling_factor": 0.18215, "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "scheduler": {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True,
        "set_alpha_to_one": False, "steps_offset": 1,
    },
}  # fmt: skip
MODELS = {"sd15": SD15}


def byte_tokens() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's tokenizers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = itertools.count(256)
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def tokenizer(size: int, length: int) -> Any:
    """A CLIP tokenizer of the given vocabulary size, with made-up merges."""
    from transformers import CLIPTokenizer

    single = byte_tokens()
    merges = list(itertools.islice(itertools.product(single, single), size - 514))
    words = [*single, *(f"{t}</w>" for t in single), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=length)


def build(name: str, folder: Path, dtype: str = "float16", seed: int = 0) -> Path:
    """The checkpoint of a model of `MODELS` in diffusers format."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = MODELS[name]
    kind = getattr(torch, dtype)
    torch.manual_seed(seed)
    text = CLIPTextConfig(**config["text_encoder"])
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text).to(kind),
        tokenizer=tokenizer(text.vocab_size, text.max_position_embeddings),
        unet=UNet2DConditionModel(**config["unet"]).to(kind),
        vae=AutoencoderKL(**config["vae"]).to(kind),
        scheduler=PNDMScheduler(**config["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    args = parser.parse_args()
    print(build(args.model, args.output, args.dtype))
