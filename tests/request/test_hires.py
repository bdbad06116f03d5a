"""Hires fix is two calls: the first one's latents, enlarged, are the image of the second."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.cli.main import main
from sdopt.denoise.upscale import upscaled
from sdopt.engine.pool import EnginePool
from sdopt.errors import UsageError
from sdopt.image.pil import read_parameters
from sdopt.request.keywords import replayed
from sdopt.request.plan import make_plan
from tests.conftest import without_address

SIZE = {"height": 64, "width": 48}
OPTIONS = {"num_inference_steps": 4, "guidance_scale": 3.0, **SIZE}


@pytest.fixture(scope="module")
def emoji() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as pipe:
        yield pipe


@pytest.mark.parametrize("size", [(16, 12), (8, 6), (13, 7), (11, 20)], ids=without_address)
def test_latents_are_enlarged_as_torch_enlarges_them(size: tuple[int, int]) -> None:
    import torch

    latents = np.random.default_rng(0).normal(size=(2, 4, 8, 6)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(latents), size, mode="bilinear", antialias=False)
    found = upscaled(latents, *size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def by_hand(pipe: sdopt.Pipeline, prompt: Any, first: Any, second: Any, size: tuple[int, int]) -> np.ndarray:
    """The same two calls, with the latents enlarged between them."""
    small = pipe(prompt, output_type="latent", **first).images
    factor = pipe.bundle.manifest.latents.factor
    large = upscaled(small, size[0] // factor, size[1] // factor)
    return pipe(prompt, image=large, output_type="np", **{**first, "latents": None, **second}).images


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_sde", "unipc", "lcm"])
def test_it_is_the_same_two_calls_by_hand(sampler: str, emoji: sdopt.Pipeline) -> None:
    first = {**OPTIONS, "sampler": sampler, "seed": 5, "negative_prompt": "blue"}
    second = {"strength": 0.7, "height": 128, "width": 96}
    expected = by_hand(emoji, "a cat", first, second, (128, 96))
    found = emoji("a cat", hires=2, output_type="np", **first).images
    assert found.shape == (1, 128, 96, 3)
    np.testing.assert_array_equal(found, expected)


def test_every_option_of_the_second_pass_is_that_of_a_call(emoji: sdopt.Pipeline) -> None:
    noise = np.random.default_rng(0).normal(size=(4, 4, 8, 6)).astype(np.float32)
    first = {**OPTIONS, "latents": noise, "num_images_per_prompt": 2, "seed": [3, 4, 5, 6], "vae_slice": True}
    first |= {"guidance_interval": (0.5, 1.0), "guidance_rescale": 0.5, "prompt_style": "a1111"}
    second = {"strength": 0.4, "num_inference_steps": 6, "height": 96, "width": 72}
    expected = by_hand(emoji, ["a (cat:1.2)", "a dog"], first, second, (96, 72))
    hires = {"hires": 1.5, "hires_strength": 0.4, "hires_steps": 6}
    np.testing.assert_array_equal(emoji(["a (cat:1.2)", "a dog"], output_type="np", **hires, **first).images, expected)


def test_an_sdxl_is_told_the_size_of_each_pass(sdxl_bundle: Path) -> None:
    with sdopt.load(sdxl_bundle) as pipe:
        first = {"num_inference_steps": 3, "guidance_scale": 3.0, "seed": 1, **SIZE}
        expected = by_hand(pipe, "a cat", first, {"strength": 0.7, "height": 128, "width": 96}, (128, 96))
        np.testing.assert_array_equal(pipe("a cat", hires=2.0, output_type="np", **first).images, expected)


def test_the_sizes_of_an_sdxl_are_recorded_for_both_passes_or_not_at_all(emoji: sdopt.Pipeline) -> None:
    """Else a replay would give the sizes of the first pass to the second."""
    entry = replace(emoji.bundle.manifest.conditioning, time_ids=("original_size", "target_size"))
    xl = replace(emoji.bundle, manifest=replace(emoji.bundle.manifest, conditioning=entry))
    plan = make_plan(xl, "a cat", {"hires": 2.0, "target_size": (7, 9), **OPTIONS})  # pyright: ignore
    again = make_plan(xl, None, replayed(plan.parameters(0)))  # pyright: ignore
    assert again.second is not None
    assert plan.second is not None
    assert again.second.sizes == plan.second.sizes != plan.sizes == again.sizes
    assert plan.second.sizes["original_size"] == (128, 96)
    assert plan.second.sizes["target_size"] == (7, 9)


def test_guidance_that_only_the_second_pass_reaches_is_there(emoji: sdopt.Pipeline) -> None:
    first = {**OPTIONS, "num_inference_steps": 1, "seed": 5, "guidance_interval": (0.4, 1.0)}
    second = {"strength": 0.7, "num_inference_steps": 6, "height": 128, "width": 96}
    assert not make_plan(emoji.bundle, "a cat", first).guided  # pyright: ignore
    expected = by_hand(emoji, "a cat", first, second, (128, 96))
    found = emoji("a cat", hires=2.0, hires_steps=6, output_type="np", **first).images
    np.testing.assert_array_equal(found, expected)


def test_steps_callbacks_and_previews_go_through_both_passes(emoji: sdopt.Pipeline) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    emoji("a cat", hires=2.0, seed=1, callback_on_step_end=lambda pipe, k, t, data: seen.append(
        (k, data["latents"].shape)), **OPTIONS)  # fmt: skip
    small, large = (1, 4, 8, 6), (1, 4, 16, 12)
    assert seen == [*((k, small) for k in range(4)), *((k, large) for k in range(4, 6))]
    steps = list(emoji.denoise("a cat", hires=2.0, seed=1, **OPTIONS))
    assert [(step.index, step.of) for step in steps] == [(k, 6) for k in range(6)]
    assert [emoji.preview(step.denoised)[0].size for step in steps] == [(6, 8)] * 4 + [(12, 16)] * 2
    made = emoji("a cat", hires=2.0, seed=1, output_type="latent", **OPTIONS).images
    np.testing.assert_array_equal(steps[-1].sample, made)


def test_what_is_written_into_the_last_small_step_steers_the_second_pass(emoji: sdopt.Pipeline) -> None:
    found = np.zeros(0)
    for step in emoji.denoise("a cat", hires=2.0, seed=1, **OPTIONS):
        if step.index == 3:
            step.sample[...] = 0
        found = step.sample
    image = np.zeros((1, 4, 16, 12), np.float32)
    options = {**OPTIONS, "height": 128, "width": 96}
    expected = emoji("a cat", image=image, strength=0.7, seed=1, output_type="latent", **options).images
    np.testing.assert_array_equal(found, expected)


def test_prompts_are_encoded_once_and_a_loop_that_is_left_ends_there(emoji: sdopt.Pipeline) -> None:
    calls = {"text_encoder": 0, "unet": 0}

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.engine = name, emoji.engine(name)
            self.inputs, self.outputs = self.engine.inputs, self.engine.outputs

        def __call__(self, **arrays: Any) -> Any:
            calls[self.name] += 1
            return self.engine(**arrays)

        def close(self) -> None: ...

    pipe = sdopt.Pipeline(EnginePool(emoji.bundle, given={name: Counted(name) for name in calls}))  # pyright: ignore
    pipe("a cat", hires=2.0, seed=1, **OPTIONS)
    assert calls == {"text_encoder": 1, "unet": 6}
    for step in pipe.denoise("a cat", hires=2.0, seed=1, **OPTIONS):
        if step.index == 4:
            break
    assert calls == {"text_encoder": 2, "unet": 11}


def test_the_command_makes_it_tells_it_and_makes_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], emoji: sdopt.Pipeline
) -> None:
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    flags = ["--hires", "2", "--hires-strength", "0.5", "--hires-steps", "6", "--steps", "2", "--size", "48x64"]
    assert main(["generate", "a cat", *flags, "--seed", "3", "--json", "-o", str(first)]) == 0
    entry = json.loads(capsys.readouterr().out)["images"][0]
    with Image.open(first) as image:
        assert image.size == (96, 128)
        text = image.info["parameters"]
    told = {"hires": 2.0, "hires_strength": 0.5, "hires_steps": 6, "hires_calls": 3, "width": 48, "height": 64}
    assert {name: entry[name] for name in told} == told
    assert {name: read_parameters(first)[name] for name in told} == told
    line = "Size: 48x64, .*Denoising strength: 0.5, .*Hires upscale: 2.0, Hires steps: 3, Hires upscaler: Latent"
    assert re.search(line, text), text
    assert main(["generate", "--replay", str(first), "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    result = emoji("a cat", hires=2, hires_strength=0.5, hires_steps=6, num_inference_steps=2, seed=3, **SIZE)
    np.testing.assert_array_equal(np.asarray(result.images[0]), np.asarray(Image.open(first)))


def test_a_plan_of_two_passes_is_prepared_pass_by_pass(emoji: sdopt.Pipeline) -> None:
    plan = make_plan(emoji.bundle, "a cat", {"hires": 2.0, "seed": 1, **OPTIONS})  # pyright: ignore
    with pytest.raises(UsageError, match="two passes; prepare each of plan.passes"):
        emoji.prepare(plan)
    assert [emoji.prepare(one).canvas.sample.shape for one in plan.passes] == [(1, 4, 8, 6), (1, 4, 16, 12)]
    assert plan.calls == 6


PHOTO = Image.new("RGB", (64, 64), "green")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"hires_strength": 0.5}, "hires_strength", "hires_strength needs hires: give hires=2.0"),
        ({"hires_steps": 5}, "hires_steps", "hires_steps needs hires"),
        ({"hires": 2, "image": PHOTO}, "image", "image and hires: .*larger height="),
        ({"hires": 2, "image": PHOTO, "mask_image": PHOTO}, "image", "image and hires"),
        ({"hires": 2, "denoising_end": 0.8}, "denoising_end", "denoising_end and hires: both passes go all the way"),
        ({"hires": 2, "guidance_scale": [3.0] * 4}, "guidance_scale", "give one scale"),
        ({"hires": 2, "hires_steps": 5, "timesteps": [900, 1], "sampler": "euler"}, "hires_steps", "leave out hires_s"),
        (
            {"hires": 4, "height": 8, "width": 8192},
            "hires",
            "hires = 4 makes 32768x32 pixels of 8192x8; allowed are 16",
        ),
        ({"hires": 4, "height": 4096, "width": 2048}, "hires", "allowed are 16384 a side and 64,000,000 in all"),
        ({"hires": 2, "hires_strength": 0.0}, "hires_strength", "hires, the second pass: strength"),
        ({"hires": 2, "hires_steps": 10**6}, "hires_steps", "hires, the second pass: .*1000 timesteps"),
        ({"hires": 0.5}, "hires", "hires = 0.5; allowed are numbers from 1 to 4"),
        ({"enable_hr": True}, "enable_hr", "use hires=2.0"),
    ],
    ids=without_address,
)
def test_what_does_not_fit_beside_it_is_refused_before_the_first_step(
    options: Any, param: str, message: str, emoji: sdopt.Pipeline
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_plan(emoji.bundle, "a cat", options)
    assert caught.value.param == param
