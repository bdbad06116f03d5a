"""SDXL's pictures are those that diffusers makes: two encoders, pooled text, sizes and crop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.errors import UsageError
from tests.test_pipeline import FLOOR_DB, picture_psnr

OPTIONS = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}


@pytest.fixture(scope="module")
def pair(sdxl_checkpoint: Path, sdxl_bundle: Path) -> tuple[Any, sdopt.Pipeline]:
    """The same random checkpoint in diffusers and in sdopt."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, sdopt.load(sdxl_bundle)


def generators(*seeds: int) -> Any:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative_prompt": "a dog"},
        {"negative_prompt": ""},
        {"prompt_2": "b", "negative_prompt": "c", "negative_prompt_2": "d"},
        {"height": 24, "width": 32},
        {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (40, 24)},
        {"denoising_end": 0.6},
        {"guidance_scale": 1.0},
        {"clip_skip": 1},
    ],
    ids=lambda o: ",".join(o) or "plain",
)
def test_the_picture_is_the_one_that_diffusers_makes(options: dict, pair: Any) -> None:
    theirs, ours = pair
    options = {**OPTIONS, **options}
    several = {k: [v] * 2 if k.endswith(("prompt", "prompt_2")) else v for k, v in options.items()}
    expected = theirs(["a cat", "a"], generator=generators(5, 6), **{"height": 24, "width": 24, **several}).images
    found = ours(["a cat", "a"], seed=[5, 6], **options).images
    assert found.shape == expected.shape
    assert picture_psnr(expected, found) >= FLOOR_DB


@pytest.mark.parametrize("more", [{}, {"negative_crops_coords_top_left": (1, 2), "negative_prompt": "b"}], ids=str)
def test_the_negative_half_has_sizes_of_its_own(more: dict, pair: Any) -> None:
    """Alone as in diffusers; in a batch diffusers 0.42 gives them to the wrong rows."""
    theirs, ours = pair
    options = {**OPTIONS, "negative_original_size": (20, 30), "negative_target_size": (48, 24), **more}
    options["crops_coords_top_left"] = (3, 5)
    expected = theirs("a cat", generator=generators(5), height=24, width=24, **options).images
    found = ours(["a cat", "a"], seed=[5, 6], **options)
    assert picture_psnr(expected[0], found.images[0]) >= FLOOR_DB
    again = {key: found.parameters[1].get(key) for key in options if key not in OPTIONS}
    alone = ours("a", seed=6, **{**OPTIONS, **again}).images[0]
    assert picture_psnr(alone, found.images[1]) >= FLOOR_DB


def test_given_embeddings_take_the_place_of_the_prompt(pair: Any) -> None:
    theirs, ours = pair
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    tensors = theirs.encode_prompt("a cat", negative_prompt="a", device="cpu")
    given = {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}
    expected = ours("a cat", negative_prompt="a", seed=1, **OPTIONS).images
    np.testing.assert_allclose(ours(seed=1, **given, **OPTIONS).images, expected, atol=1e-4)
    del given["pooled_prompt_embeds"]
    with pytest.raises(UsageError, match="also takes pooled_prompt_embeds"):
        ours(seed=1, **given, **OPTIONS)


def test_long_prompts_are_read_by_both_encoders(pair: Any) -> None:
    ours = pair[1]
    assert ours.encode(["a b c d e f g h"], "a1111").shape == (1, 14, 32)
    result = ours("a b c d e f g h", prompt_2="a", prompt_style="a1111", seed=1, **OPTIONS)
    assert np.isfinite(result.images).all()


def test_the_manifest_says_what_the_family_needs(pair: Any) -> None:
    manifest = pair[1].bundle.manifest
    assert manifest.family == "sdxl"
    assert manifest.float16_unsafe == ("vae_decoder", "vae_encoder")
    assert manifest.defaults.guidance_scale == 5.0
    assert manifest.conditioning.pooled == "text_encoder_2"
    assert manifest.conditioning.zeros_for_empty is True
    assert set(manifest.tokenizers) == {"tokenizer", "tokenizer_2"}


@pytest.mark.parametrize("name", ["original_size", "target_size", "crops_coords_top_left", "negative_target_size"])
def test_a_size_that_is_no_pair_is_refused(name: str, pair: Any) -> None:
    with pytest.raises(UsageError, match=rf"{name} = .*; allowed is \(height, width\)"):
        pair[1]("a", **{name: 24})


def test_a_learnt_word_is_read_by_both_encoders(pair: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.numpy import save_file

    theirs, ours = pair
    rng = np.random.default_rng(0)
    rows = {"clip_l": rng.standard_normal((2, 20), np.float32), "clip_g": rng.standard_normal((2, 12), np.float32)}
    path = tmp_path / "word.safetensors"
    save_file(rows, path)
    with pytest.raises(UsageError, match="is for one text encoder; this model has text_encoder"):
        ours.load_embedding(rows["clip_l"], "<word>")
    assert ours.load_embedding(path, "<word>") == "<word>"
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {kind: getattr(theirs, f"{kind}{suffix}") for kind in ("text_encoder", "tokenizer")}
        theirs.load_textual_inversion(torch.from_numpy(rows[key]), token="<word>", **parts)
    size = {"height": 24, "width": 24}
    expected = theirs("a <word>", negative_prompt="b", generator=generators(5), **size, **OPTIONS).images
    assert picture_psnr(expected, ours("a <word>", negative_prompt="b", seed=5, **OPTIONS).images) >= 55
