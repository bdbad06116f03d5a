"""Real parts for the tests: the embedded model, and a tiny pipeline with odd channel counts, exported once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network

ROOT = Path(__file__).parent.parent
EMOJI_CHECKPOINT = ROOT / "engines/emoji/checkpoint"
EMOJI_BUNDLE = ROOT / "engines/emoji/bundle"


def make_tiny_tokenizer() -> Any:
    """CLIP's kind of tokenizer, for letters, the word apple, and 7 tokens."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    words += ["ap", "app", "appl", "apple</w>"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("a", "p"), ("ap", "p"), ("app", "l"), ("appl", "e</w>")]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=7)


def make_tiny_checkpoint(folder: Path, in_channels: int = 4) -> Path:
    """A random Stable Diffusion pipeline whose sizes are nobody's defaults: 7 tokens, factor 2."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = make_tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=20,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=12, in_channels=in_channels, block_out_channels=(12, 28), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=20, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(6, 10), norm_num_groups=2, layers_per_block=1, sample_size=24, scaling_factor=0.7,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, **config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    from sdopt.export import export

    return export(tiny_checkpoint, tiny_checkpoint.parent / "bundle", report=lambda line: None)


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Path:
    """A copy of the embedded bundle, to be damaged."""
    import shutil

    return Path(shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle"))


def edit_manifest(bundle: Path, **changes: object) -> None:
    """Change top-level entries of a manifest."""
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def sdopt(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does: in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sdopt", *map(str, args)],
        capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT, check=False,
    )  # fmt: skip
