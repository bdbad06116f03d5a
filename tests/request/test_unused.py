"""Every keyword has an effect that can be seen, or the call says that it has none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.cli.main import main
from sdopt.errors import UsageError
from sdopt.image.pil import read_parameters, save_png
from sdopt.request.keywords import KEYWORDS
from sdopt.request.plan import make_plan
from sdopt.request.unused import RULES, UnusedError

BASE: dict[str, Any] = {
    "prompt": "a (red:1.3) apple", "seed": 1, "num_inference_steps": 3, "guidance_scale": 3.0,
    "height": 64, "width": 64,
}  # fmt: skip
SHADES = np.random.default_rng(0)
PICTURE, NOISE = SHADES.random((64, 64, 3), np.float32), SHADES.normal(size=(1, 4, 8, 8)).astype(np.float32)
MASK = np.zeros((64, 64), np.float32)
MASK[16:40, 16:40] = 1
MASKED = {"image": PICTURE, "mask_image": MASK}
EMBEDS = SHADES.normal(size=(1, 32, 128)).astype(np.float32)
EMBEDDED = {"prompt": None, "prompt_embeds": EMBEDS}
OFF = {"guidance_scale": 1.0}
LATENTS = {"latents": NOISE, "sampler": "ddim"}

# keyword -> (what is beside it, its value): with it the picture is another one
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "prompt": ({}, "a cat"),
    "image": ({}, PICTURE),
    "mask_image": ({"image": PICTURE}, MASK),
    "mask_blur": (MASKED, 8.0),
    "padding_mask_crop": (MASKED, 0),
    "strength": ({"image": PICTURE}, 0.4),
    "denoising_start": ({"image": NOISE, "seed": None}, 0.5),
    "denoising_end": ({}, 0.5),
    "control_image": ({}, PICTURE),
    "controlnet_conditioning_scale": ({"control_image": PICTURE}, 0.3),
    "control_guidance_start": ({"control_image": PICTURE}, 0.6),
    "control_guidance_end": ({"control_image": PICTURE}, 0.6),
    "guess_mode": ({"control_image": PICTURE}, True),
    "hires": ({}, 1.5),
    "hires_strength": ({"hires": 1.5}, 0.4),
    "hires_steps": ({"hires": 1.5}, 5),
    "negative_prompt": ({}, "blue"),
    "num_inference_steps": ({}, 2),
    "guidance_scale": ({}, 5.0),
    "guidance_interval": ({}, (0.5, 1.0)),
    "guidance_rescale": ({}, 0.7),
    "seed": ({}, 2),
    "rng": ({}, "numpy"),
    "sampler": ({}, "euler_a"),
    "schedule": ({"sampler": "euler"}, "karras"),
    "eta": ({"sampler": "ddim"}, 0.5),
    "timesteps": ({"sampler": "euler"}, [999, 500, 100]),
    "sigmas": ({"sampler": "euler"}, [14.0, 3.0, 1.0, 0.0]),
    "latents": ({"seed": None}, NOISE),
    "prompt_style": ({}, "a1111"),
    "clip_skip": ({}, 1),
    "prompt_embeds": (EMBEDDED, EMBEDS[:, ::-1].copy()),
    "negative_prompt_embeds": (EMBEDDED, EMBEDS[:, ::-1].copy()),
    "vae_tile": ({"height": 256, "width": 256}, 16),
    "height": ({}, 72),
    "width": ({}, 72),
    "num_images_per_prompt": ({}, 2),
}
HOW = {"guidance_batch", "vae_slice"}  # they change how a picture is made, and not the picture
ELSEWHERE = {  # proven on models that have what they need
    "mu": "tests/samplers/oracle.py",
    "lora_scale": "tests/adapters",
    "pooled_prompt_embeds": "tests/request/test_together.py",
    "negative_pooled_prompt_embeds": "tests/request/test_together.py",
    "ip_adapter_image": "tests/adapters/test_ip_adapter.py",
    "ip_adapter_image_embeds": "tests/adapters/test_ip_adapter.py",
    "ip_adapter_scale": "tests/adapters/test_ip_adapter.py",
    "control_mode": "tests/adapters/test_union.py",
    "prompt_3": "tests/test_sd3.py",
    "negative_prompt_3": "tests/test_sd3.py",
    "max_sequence_length": "tests/test_sd3.py",
    "true_cfg_scale": "tests/test_flux.py",
    "preset": "tests/request/test_presets.py",
    "cache_interval": "tests/denoise/test_cache.py",
    "cache_schedule": "tests/denoise/test_cache.py",
    "cache_depth": "tests/denoise/test_cache.py",
    "adapter_conditioning_scale": "tests/adapters/test_t2i_adapter.py",
    "vae": "tests/adapters/test_tiny_vae.py",
    "adapter_conditioning_factor": "tests/adapters/test_t2i_adapter.py",
}
OF_SDXL = {  # they change what SDXL's UNet is given
    "prompt_2": "a dog", "negative_prompt_2": "a dog", "original_size": (5, 6), "crops_coords_top_left": (1, 2),
    "target_size": (5, 6), "negative_crops_coords_top_left": (1, 2), "aesthetic_score": 1.0,
    "negative_aesthetic_score": 1.0, "negative_original_size": (5, 6), "negative_target_size": (5, 6),
}  # fmt: skip

PAIR = {"negative_original_size", "negative_target_size"}  # in text to image both are given, or neither

# keyword, what is beside it, its value: nothing reads it, and the call is refused
REFUSED: list[tuple[str, dict[str, Any], Any]] = [
    *((name, {}, value) for name, value in OF_SDXL.items() if name not in PAIR),
    ("pooled_prompt_embeds", EMBEDDED, EMBEDS[:, 0]),
    ("negative_pooled_prompt_embeds", {"negative_prompt_embeds": EMBEDS}, EMBEDS[:, 0]),
    ("prompt_3", {}, "a dog"),
    ("negative_prompt_3", {}, "a dog"),
    ("max_sequence_length", {}, 9),
    ("true_cfg_scale", {"negative_prompt": "a dog"}, 2.0),
    ("mask_image", {}, MASK),
    ("mask_blur", {"image": PICTURE}, 8.0),
    ("padding_mask_crop", {"image": PICTURE}, 0),
    ("padding_mask_crop", {"image": NOISE, "mask_image": MASK}, 0),
    ("strength", {}, 0.5),
    ("strength", {"image": NOISE, "denoising_start": 0.5}, 0.5),
    ("denoising_start", {}, 0.5),
    ("controlnet_conditioning_scale", {}, 0.5),
    ("control_mode", {}, 1),
    ("control_guidance_start", {}, 0.5),
    ("adapter_conditioning_scale", {}, 0.5),
    ("adapter_conditioning_factor", {}, 0.5),
    ("control_guidance_end", {}, 0.5),
    ("guess_mode", {}, True),
    ("ip_adapter_scale", {}, 0.5),
    ("hires_strength", {}, 0.5),
    ("hires_steps", {}, 3),
    ("hires_steps", {"hires": 2.0, "sampler": "euler", "timesteps": [999, 500]}, 3),
    ("num_inference_steps", {"sampler": "euler", "timesteps": [999, 500]}, 3),
    ("num_inference_steps", {"sampler": "euler", "sigmas": [14.0, 3.0, 0.0]}, 3),
    ("cache_depth", {}, 2),
    ("guidance_interval", OFF, (0.5, 1.0)),
    ("guidance_interval", {"guidance_scale": [1.0, 0.0, 1.0]}, (0.5, 1.0)),
    ("prompt_style", {**EMBEDDED, **OFF}, "a1111"),
    ("prompt_style", {**EMBEDDED, "negative_prompt_embeds": EMBEDS}, "a1111"),
    ("clip_skip", EMBEDDED, 1),
    ("lora_scale", {}, 0.5),
    ("mu", {}, 1.0),
    ("eta", {"sampler": "euler"}, 0.5),
    ("schedule", {"sampler": "ddpm", "timesteps": [999, 500, 100]}, "trailing"),
    ("schedule", {"sampler": "dpmpp_2m", "timesteps": [999, 500, 100]}, "leading"),
    ("timesteps", {"sampler": "ddim"}, [999, 500]),
    ("sigmas", {"sampler": "ddim"}, [14.0, 3.0, 0.0]),
]  # fmt: skip
# the same for what diffusers takes without effect: a line in the log
REMARKED: list[tuple[str, dict[str, Any], Any]] = [
    ("negative_prompt", OFF, "blue"),
    ("negative_prompt", {"guidance_scale": 0.0}, ["blue"]),
    ("negative_prompt_embeds", {**EMBEDDED, **OFF}, EMBEDS),
    ("guidance_rescale", OFF, 0.7),
    ("guidance_batch", OFF, 1),
    ("seed", LATENTS, 2),
    ("rng", {**LATENTS, "seed": None}, "numpy"),
    ("schedule", {"sampler": "lcm"}, "trailing"),
]  # fmt: skip


@pytest.fixture(scope="module")
def emoji() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as pipe:
        yield pipe


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """The warnings that the library logs."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("sdopt")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def with_base(beside: dict[str, Any]) -> dict[str, Any]:
    options = {**BASE, **beside}
    if {"timesteps", "sigmas"} & set(options):
        options.pop("num_inference_steps")
    return {name: value for name, value in options.items() if value is not None}


def picture(pipe: sdopt.Pipeline, options: dict[str, Any]) -> Any:
    return pipe(output_type="np" if "padding_mask_crop" not in options else "pil", **options).images


def test_every_keyword_has_its_place_in_the_tables() -> None:
    assert set(CHANGES) | HOW | set(ELSEWHERE) | set(OF_SDXL) == set(KEYWORDS)
    silent = PAIR | {name for name, _, _ in (*REFUSED, *REMARKED)}
    ruled = {name for rule in RULES for name in rule.keywords}
    assert ruled <= silent | {"guidance_scale"}  # which Flux schnell takes without effect: tests/test_flux.py
    always = {"prompt", "image", "control_image", "ip_adapter_image", "ip_adapter_image_embeds", "denoising_end",
              "hires", "guidance_scale", "sampler", "latents", "prompt_embeds", "vae_tile", "vae_slice", "height",
              "width", "num_images_per_prompt", "cache_interval", "cache_schedule", "vae", "preset"}  # fmt: skip
    assert set(KEYWORDS) - silent == always


@pytest.mark.parametrize("name", CHANGES)
def test_it_changes_the_picture(name: str, emoji: sdopt.Pipeline, heard: list[str]) -> None:
    beside, value = CHANGES[name]
    before = with_base(beside)
    options = with_base({**beside, name: value})
    first, second = picture(emoji, before), picture(emoji, options)
    assert not [line for line in heard if "has no effect" in line]
    same = np.shape(first) == np.shape(second) and np.array_equal(np.array(first), np.array(second))
    assert not same


@pytest.mark.parametrize(("name", "beside", "value"), REFUSED)
def test_it_is_refused_where_nothing_reads_it(
    name: str, beside: dict[str, Any], value: Any, emoji: sdopt.Pipeline
) -> None:
    emoji.plan(**with_base(beside))
    with pytest.raises(UsageError) as caught:
        emoji.plan(**{**with_base(beside), name: value})
    message = str(caught.value)
    assert caught.value.param == name
    assert name in message
    assert any(word in message for word in ("leave", "give", "load", "samplers that", "needs")), message


@pytest.mark.parametrize(("name", "beside", "value"), REMARKED)
def test_where_diffusers_takes_it_without_effect_a_line_says_so(
    name: str, beside: dict[str, Any], value: Any, emoji: sdopt.Pipeline, heard: list[str]
) -> None:
    def lines(options: dict[str, Any]) -> tuple[Any, list[str]]:
        heard.clear()
        made = picture(emoji, options)
        return made, [line for line in heard if "has no effect" in line]

    before = with_base({**beside, "seed": None} if name == "seed" else beside)
    first, quiet = lines(before)
    second, said = lines({**before, name: value})
    assert quiet == []
    assert [line for line in said if name in line] == said != []
    if "seed" in before or "latents" in before:
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"crops_coords_top_left": (0, 0), "original_size": (64, 64), "target_size": (64, 64)},
        {"prompt_2": "a (red:1.3) apple", "negative_prompt_2": ""}, {"aesthetic_score": 6.0}, {"mask_blur": 0.0},
        {**OFF, "negative_prompt": "", "guidance_rescale": 0.0, "guidance_interval": (0.0, 1.0)},
        {"negative_prompt": [""], **OFF}, {"num_inference_steps": 2, "sampler": "euler", "timesteps": [999, 500]},
        {"eta": 0.0, "sampler": "euler"}, {"sampler": "euler", "timesteps": [999, 500], "schedule": "normal"},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_is_the_default_is_no_mistake(options: dict[str, Any], emoji: sdopt.Pipeline) -> None:
    given = {name: value for name, value in BASE.items() if name != "num_inference_steps" or "timesteps" not in options}
    assert emoji.plan(**{**given, **options}).remarks == ()


def xl_of(bundle: sdopt.Bundle, *time_ids: str, encoders: int = 2) -> sdopt.Bundle:
    entry = bundle.manifest.conditioning
    conditioning = replace(entry, time_ids=time_ids, encoders=entry.encoders * encoders)
    return replace(bundle, manifest=replace(bundle.manifest, conditioning=conditioning))


def test_sdxls_keywords_are_read_where_a_model_has_them(emoji: sdopt.Pipeline) -> None:
    xl = xl_of(emoji.bundle, "original_size", "crops_coords_top_left", "target_size")
    refiner = xl_of(emoji.bundle, "original_size", "crops_coords_top_left", "aesthetic_score", encoders=1)
    of_xl = ("prompts_2", "negative_prompts_2", "sizes", "negative_sizes")
    for name, value in OF_SDXL.items():
        options: Any = {**BASE, name: value}
        if name in PAIR:
            options |= dict.fromkeys(PAIR, (5, 6))
            with pytest.raises(UnusedError, match="negative_(original|target)_size has no effect"):
                emoji.plan(**options)
        prompt = options.pop("prompt")
        fits, other = (refiner, xl) if "aesthetic" in name else (xl, refiner)
        changed, base = make_plan(fits, prompt, options), make_plan(fits, prompt, {**BASE, "prompt": prompt})  # pyright: ignore
        assert changed.remarks == ()
        assert any(getattr(changed, part) != getattr(base, part) for part in of_xl), name
        if "negative" in name:
            assert any(name in line for line in make_plan(fits, prompt, {**options, **OFF}).remarks)
        if name not in ("original_size", "crops_coords_top_left", "negative_original_size",
                        "negative_crops_coords_top_left"):  # fmt: skip
            with pytest.raises(UnusedError, match="has no effect"):
                make_plan(other, prompt, options)


def test_a_model_with_an_embedded_scale_has_no_second_half_to_compare_with(emoji: sdopt.Pipeline) -> None:
    entry = replace(emoji.bundle.manifest.conditioning, guidance_embedding=256)
    distilled = replace(emoji.bundle, manifest=replace(emoji.bundle.manifest, conditioning=entry))
    with pytest.raises(UnusedError, match="guidance_rescale has no effect"):
        make_plan(distilled, "a cat", {"guidance_rescale": 0.5})
    assert make_plan(distilled, "a cat", {"guidance_interval": (0.5, 1.0)}).remarks == ()


def test_no_picture_is_decoded_for_latents(emoji: sdopt.Pipeline, heard: list[str]) -> None:
    emoji(**BASE, output_type="latent", vae_tile=16)
    assert any("nothing is decoded" in line for line in heard)


def test_a_picture_that_carries_a_keyword_without_effect_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, old, again = (tmp_path / f"{name}.png" for name in ("first", "old", "again"))
    assert main(["generate", "a cat", "--steps", "1", "--seed", "1", "-o", str(first)]) == 0
    save_png(Image.open(first), old, {**read_parameters(first), "original_size": [5, 6], "prompt_2": "x"})
    assert main(["generate", "--replay", str(old), "-o", str(again)]) == 0
    np.testing.assert_array_equal(Image.open(first), Image.open(again))
    capsys.readouterr()
    assert main(["generate", "a cat", "--prompt-2", "x", "-o", str(again)]) == 2
    assert "--prompt-2 has no effect: this model has one text encoder" in capsys.readouterr().err


def test_the_command_says_that_a_negative_prompt_has_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["generate", "a cat", "--steps", "1", "--guidance", "1", "--negative", "blue"]
    assert main([*request, "-o", str(tmp_path / "a.png")]) == 0
    assert "sdopt: --negative has no effect: guidance is off" in capsys.readouterr().err
