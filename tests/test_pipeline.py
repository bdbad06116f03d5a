"""The picture is PyTorch's picture, in any batch, and never a black one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.specs import Array
from sdopt.cli.main import main
from sdopt.engine import BACKENDS, installed_backends, open_engine
from sdopt.engine.pool import EnginePool
from sdopt.errors import NumericsError, UsageError
from sdopt.request.diffusers import INSTEAD
from sdopt.request.plan import make_plan
from sdopt.samplers import SAMPLERS
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT

FLOOR_DB = 60.0
ON_CPUS = [name for name in installed_backends() if BACKENDS[name].precisions]  # that take any bundle as it is


def picture_psnr(reference: Array, other: Array) -> float:
    """dB between pictures in 0..1."""
    return float(-10 * np.log10(np.mean(np.square(reference - other, dtype=np.float64)) + 1e-20))


@cache
def diffusers_pipeline(checkpoint: Path) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def sdopt_pipeline(bundle: Path, backend: str) -> sdopt.Pipeline:
    return sdopt.load(bundle, backend)


@pytest.fixture(params=ON_CPUS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["emoji", "tiny"])
def pair(request: pytest.FixtureRequest, backend: str) -> tuple[Any, sdopt.Pipeline]:
    """The same checkpoint in diffusers and in sdopt."""
    if request.param == "emoji":
        return diffusers_pipeline(EMOJI_CHECKPOINT), sdopt_pipeline(EMOJI_BUNDLE, backend)
    checkpoint: Path = request.getfixturevalue("tiny_checkpoint")
    return diffusers_pipeline(checkpoint), sdopt_pipeline(request.getfixturevalue("tiny_bundle"), backend)


@pytest.fixture
def emoji() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as pipe:
        yield pipe


@pytest.mark.parametrize("negative", [None, "a cat"], ids=["plain", "negative"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("wide", [False, True], ids=["own-size", "wide"])
def test_the_picture_is_the_one_that_diffusers_makes(pair: Any, wide: bool, batch: int, negative: str | None) -> None:
    import torch

    theirs, ours = pair
    defaults, factor = ours.bundle.manifest.defaults, ours.bundle.manifest.latents.factor
    size = {"height": defaults.height, "width": defaults.width + (4 * factor if wide else 0)}
    options = {"num_inference_steps": 8, "guidance_scale": 3.0, "negative_prompt": negative, **size}
    options["num_images_per_prompt"] = batch
    generators = [torch.Generator("cpu").manual_seed(41 + i) for i in range(batch)]
    expected = theirs("a red apple", generator=generators, output_type="np", **options).images
    found = ours("a red apple", seed=41, output_type="np", **options)
    assert found.images.shape == expected.shape == (batch, size["height"], size["width"], 3)
    assert found.seeds == tuple(range(41, 41 + batch))
    assert picture_psnr(expected, found.images) >= FLOOR_DB


def test_without_guidance_only_the_conditional_half_runs(pair: Any) -> None:
    import torch

    theirs, ours = pair
    options = {"num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "np"}
    expected = theirs("a cat", generator=torch.Generator("cpu").manual_seed(3), **options).images
    assert picture_psnr(expected, ours("a cat", seed=3, **options).images) >= FLOOR_DB


@pytest.mark.parametrize("name", [name for name, s in SAMPLERS.items() if s.family == "diffusion"])
def test_every_sampler_makes_the_picture_of_its_diffusers_scheduler(name: str, emoji: sdopt.Pipeline) -> None:
    import diffusers
    import torch

    theirs, entry = diffusers_pipeline(EMOJI_CHECKPOINT), SAMPLERS[name]
    own, options = theirs.scheduler, {"num_inference_steps": 9, "guidance_scale": 2.0, "output_type": "np"}
    scheduler = getattr(diffusers, entry.diffusers)
    theirs.scheduler = scheduler.from_config(own.config, clip_sample=False, **entry.forced)
    try:
        expected = theirs("a cat", generator=torch.Generator("cpu").manual_seed(3), **options).images
    finally:
        theirs.scheduler = own
    assert picture_psnr(expected, emoji("a cat", seed=3, sampler=name, **options).images) >= FLOOR_DB


def test_an_image_of_a_batch_is_the_image_made_alone(emoji: sdopt.Pipeline) -> None:
    options = {"num_inference_steps": 4, "output_type": "np"}
    prompts, seeds = ["a red apple", "a cat", "a rocket on a blue background"], [7, 2**40, 7]
    together = emoji(prompts, seed=seeds, negative_prompt=["", "a dog", ""], **options).images
    for i, negative in enumerate(["", "a dog", ""]):
        alone = emoji(prompts[i], seed=seeds[i], negative_prompt=negative, **options).images[0]
        assert picture_psnr(alone, together[i]) >= 80


def test_images_of_several_prompts_stand_prompt_by_prompt(emoji: sdopt.Pipeline) -> None:
    result = emoji(["a cat", "a dog"], num_images_per_prompt=2, seed=5, num_inference_steps=1)
    assert [p["prompt"] for p in result.parameters] == ["a cat", "a cat", "a dog", "a dog"]
    assert result.seeds == (5, 6, 7, 8)
    assert emoji("a cat", seed=np.int64(5), num_inference_steps=np.int32(1)).seeds == (5,)


def test_without_a_seed_one_is_drawn_and_reported(emoji: sdopt.Pipeline) -> None:
    first = emoji("a cat", num_inference_steps=2, output_type="np")
    second = emoji("a cat", num_inference_steps=2, output_type="np")
    assert first.seeds != second.seeds
    again = emoji("a cat", num_inference_steps=2, output_type="np", seed=first.seeds[0])
    np.testing.assert_array_equal(again.images, first.images)


def test_guidance_in_two_calls_is_guidance_in_one(emoji: sdopt.Pipeline) -> None:
    one, two = (
        emoji("a cat", seed=1, num_inference_steps=4, guidance_scale=5.0, guidance_batch=b, output_type="np").images
        for b in (2, 1)
    )
    assert picture_psnr(one, two) >= 80


def test_given_latents_and_embeddings_take_the_place_of_seed_and_prompt(emoji: sdopt.Pipeline) -> None:
    from sdopt.samplers.noise import generator

    expected = emoji("a cat", seed=9, num_inference_steps=3, output_type="np").images
    shape = (1, *next(emoji.denoise("a cat", seed=9, num_inference_steps=1)).sample.shape[1:])
    given = emoji(
        latents=generator(9).randn(shape),
        prompt_embeds=emoji.encode(["a cat"]),
        negative_prompt_embeds=emoji.encode([""]),
        num_inference_steps=3,
        output_type="np",
    )
    np.testing.assert_allclose(given.images, expected, atol=1e-5)


def test_the_steps_are_the_callers_to_drive_and_to_stop(emoji: sdopt.Pipeline) -> None:
    expected = emoji("a cat", seed=1, num_inference_steps=6, output_type="np").images
    steps = emoji.denoise("a cat", seed=1, num_inference_steps=6)
    first = next(steps)
    assert (first.index, first.of) == (0, 6)
    assert first.sample.shape == first.denoised.shape
    second = next(steps)
    assert second.sigma < first.sigma
    assert second.timestep < first.timestep
    last = [*steps][-1]
    np.testing.assert_array_equal(emoji.decode(last.sample, "np"), expected)
    cancelled = emoji.denoise("a cat", seed=1, num_inference_steps=6)
    next(cancelled)
    cancelled.close()
    np.testing.assert_array_equal(emoji("a cat", seed=1, num_inference_steps=6, output_type="np").images, expected)


def test_the_denoised_estimate_ends_at_the_picture(emoji: sdopt.Pipeline) -> None:
    *_, last = emoji.denoise("a cat", seed=1, num_inference_steps=20)
    assert np.abs(last.denoised - last.sample).mean() < 0.05


def test_a_callback_sees_every_step_and_may_change_the_latents(emoji: sdopt.Pipeline) -> None:
    seen: list[int] = []

    def blank(pipe: sdopt.Pipeline, index: int, timestep: float, tensors: dict[str, Array]) -> dict[str, Array]:
        seen.append(index)
        return {"latents": tensors["latents"] * 0} if index == 2 else {}

    changed = emoji("a cat", seed=1, num_inference_steps=3, output_type="latent", callback_on_step_end=blank).images
    assert seen == [0, 1, 2]
    assert not changed.any()


def test_a_callback_that_raises_leaves_the_pipeline_usable(emoji: sdopt.Pipeline) -> None:
    expected = emoji("a cat", seed=1, num_inference_steps=2, output_type="np").images

    def fail(*args: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        emoji("a cat", seed=1, num_inference_steps=2, callback_on_step_end=fail)
    np.testing.assert_array_equal(emoji("a cat", seed=1, num_inference_steps=2, output_type="np").images, expected)


class FakeEngine:
    """An engine of a few lines: what the loop needs and no more."""

    inputs = outputs = ()

    def __init__(self, value: float, output: str) -> None:
        self.value, self.output, self.calls = value, output, list[dict[str, Array]]()

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        self.calls.append(arrays)
        return {self.output: np.full_like(next(iter(arrays.values())), self.value)}

    def close(self) -> None: ...


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_infinity_names_the_component_and_the_step(emoji: sdopt.Pipeline, value: float) -> None:
    given = {"unet": FakeEngine(value, "noise_pred"), "vae_decoder": FakeEngine(value, "sample")}
    pipe = sdopt.Pipeline(EnginePool(emoji.bundle, given=given))
    with pytest.raises(NumericsError, match="unet, step 1 of 3"):
        pipe("a cat", num_inference_steps=3)
    with pytest.raises(NumericsError, match="vae_decoder"):
        pipe.decode(np.zeros((1, 4, 8, 8), np.float32))


def test_a_component_can_be_released_and_comes_back(emoji: sdopt.Pipeline) -> None:
    expected = emoji("a cat", seed=1, num_inference_steps=1, output_type="np").images
    emoji.release("text_encoder")
    emoji.release("text_encoder")
    assert "text_encoder" not in emoji.pool.opened
    np.testing.assert_array_equal(emoji("a cat", seed=1, num_inference_steps=1, output_type="np").images, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps = 0; allowed are whole numbers from 1"),
        ({"num_inference_steps": True}, "num_inference_steps = True"),
        ({"num_inference_steps": 2.5}, "num_inference_steps = 2.5"),
        ({"num_inference_steps": 1001}, "1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan; allowed are finite"),
        ({"guidance_scale": "7"}, "guidance_scale = '7'"),
        ({"width": 65}, "width = 65; this model makes multiples of"),
        ({"height": 0}, "height = 0"),
        ({"height": 10**9}, "height = 1000000000"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt = 0"),
        ({"num_images_per_prompt": 65}, "num_images_per_prompt = 65"),
        ({"seed": -1}, "seed = -1; allowed are whole numbers from 0"),
        ({"seed": 2**64}, "seed = "),
        ({"seed": 1.5}, "seed = 1.5"),
        ({"seed": True}, "seed = True"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"sampler": "eulr"}, "euler"),
        ({"guidance_batch": 3}, "guidance_batch = 3"),
        ({"latents": np.zeros((1, 4, 3, 3), np.float32)}, r"latents: got float32 \(1, 4, 3, 3\)"),
        ({"prompt_embeds": np.zeros((1, 4, 3), np.float32)}, "negative_prompt_embeds"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"output_type": "jpeg"}, "output_type = 'jpeg'; allowed are"),
        ({"steps": 3}, "steps: use num_inference_steps="),
        ({"stepz": 3}, "unknown argument stepz; there are .*num_inference_steps"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_argument_is_named_with_its_value_and_what_is_allowed(
    emoji: sdopt.Pipeline, options: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        emoji("a cat", **options)


@pytest.mark.parametrize("prompt", [None, 3, [], [1], b"a"])
def test_a_prompt_is_a_text_or_a_list_of_texts(emoji: sdopt.Pipeline, prompt: Any) -> None:
    with pytest.raises(UsageError, match="prompt = "):
        emoji(prompt)


def test_a_prompt_that_is_too_long_says_what_was_left_out(emoji: sdopt.Pipeline) -> None:
    long = "a cat and " * 12 + "a rocket at the very end"
    with pytest.warns(UserWarning, match=r"the prompt has \d+ tokens, the model reads 30; left out: .*very end"):
        emoji(long, num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emoji("a cat", num_inference_steps=1)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_rescale_is_that_of_diffusers(pair: Any, rescale: float) -> None:
    import torch

    theirs, ours = pair
    options = {"num_inference_steps": 4, "guidance_scale": 6.0, "guidance_rescale": rescale, "output_type": "np"}
    expected = theirs("a cat", generator=torch.Generator("cpu").manual_seed(3), **options).images
    assert picture_psnr(expected, ours("a cat", seed=3, **options).images) >= FLOOR_DB


def test_a_stochastic_sampler_draws_its_noise_as_diffusers_does_for_every_image(pair: Any) -> None:
    import torch

    theirs, ours = pair
    own = theirs.scheduler
    ddim = __import__("diffusers").DDIMScheduler.from_config(own.config, clip_sample=False)
    theirs.scheduler = ddim
    try:
        generators = [torch.Generator("cpu").manual_seed(s) for s in (3, 2**40)]
        options = {"num_inference_steps": 6, "guidance_scale": 2.0, "eta": 0.8, "output_type": "np"}
        expected = theirs(["a cat"] * 2, generator=generators, **options).images
    finally:
        theirs.scheduler = own
    found = ours(["a cat"] * 2, seed=[3, 2**40], sampler="ddim", **options).images
    assert picture_psnr(expected, found) >= FLOOR_DB


def test_the_noise_of_other_generators_makes_other_pictures(emoji: sdopt.Pipeline) -> None:
    pictures = [
        emoji("a cat", seed=1, num_inference_steps=2, rng=rng, output_type="np").images
        for rng in ("cpu", "numpy", "cuda:a100")
    ]
    assert picture_psnr(pictures[0], pictures[1]) < 40
    assert picture_psnr(pictures[0], pictures[2]) < 40


def test_low_memory_keeps_one_component_and_makes_the_same_picture() -> None:
    options = {"seed": 1, "num_inference_steps": 3, "output_type": "np"}
    with sdopt.load() as pipe:
        expected = pipe("a cat", **options).images
    loaded: list[set[str]] = []

    def look(pipe: sdopt.Pipeline, index: int, timestep: float, data: dict) -> None:
        loaded.append(set(pipe.pool.opened))
        if index == 0:
            pipe.decode(data["latents"])  # a preview in full, which needs another component
            loaded.append(set(pipe.pool.opened))

    with sdopt.load(memory="low") as pipe:
        made = pipe("a cat", callback_on_step_end=look, **options).images
    np.testing.assert_array_equal(made, expected)
    assert loaded == [{"unet"}, {"vae_decoder"}, {"vae_decoder"}, {"vae_decoder"}]  # the loop keeps its UNet
    with pytest.raises(sdopt.UsageError, match=r"memory = 'lots'; allowed are .*low"):
        sdopt.load(memory="lots")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_command_opens_each_component_once(
    family: str, tmp_path: Path, sdxl_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(bundle: Any, component: str, *given: Any, **options: Any) -> Any:
        opened.append(component)
        return open_engine(bundle, component, *given, **options)

    monkeypatch.setattr("sdopt.engine.pool.open_engine", counted)
    Image.new("RGB", (64, 64), "green").save(tmp_path / "photo.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    model = ["-m", str(sdxl_bundle)] if family == "sdxl" else []
    files = [
        "--image",
        str(tmp_path / "photo.png"),
        "--mask",
        str(tmp_path / "mask.png"),
        "-o",
        str(tmp_path / "a.png"),
    ]
    more = ["--steps", "3", "-n", "2", "--vae-slice", "--size", "64x64", "--negative", "dull", "--guidance", "3"]
    assert main(["generate", "a cat", *model, *files, *more, "--preview-every", "1", "--no-cache"]) == 0
    encoders = ["text_encoder", "text_encoder_2"][: 1 + (family == "sdxl")]
    assert opened == [*encoders, "vae_encoder", "unet", "vae_decoder"]


@pytest.mark.parametrize("name", ["scheduler", "_interrupt", "_guidance_scale", "unet", "safety_checker", "seed", "x"])
def test_an_attribute_that_nothing_would_read_is_refused(name: str, emoji: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError, match=rf"^pipe\.{name} cannot be set: ") as caught:
        setattr(emoji, name, None)
    assert caught.value.param == name
    assert not hasattr(emoji, name)


@pytest.mark.parametrize("name", INSTEAD)
def test_a_keyword_of_diffusers_gets_a_sentence(name: str, emoji: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError, match=f"^{name}: {re.escape(INSTEAD[name])}$") as caught:
        emoji("a cat", **{name: None})
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["bundle", "pool", "backend", "precision", "provenance", "_text", "_vae"])
def test_what_load_decides_cannot_be_set(name: str, emoji: sdopt.Pipeline) -> None:
    before = getattr(emoji, name)
    with pytest.raises(
        UsageError, match=rf"^pipe\.{name} cannot be set: sdopt.load decides it; make another"
    ) as caught:
        setattr(emoji, name, sdopt.Bundle.open(emoji.bundle.path))
    assert caught.value.param == name
    assert getattr(emoji, name) == before


SAMPLE = np.zeros((1, 4, 8, 8), np.float32)


@pytest.mark.parametrize("value", [3, 0, -8, 2.5, "16", True, 2**40])
def test_decode_checks_its_tile_as_a_call_does(value: Any, emoji: sdopt.Pipeline) -> None:
    messages: list[str] = []
    for attempt in (
        lambda: emoji.decode(SAMPLE, vae_tile=value),
        lambda: emoji("a cat", num_inference_steps=1, vae_tile=value),
    ):
        with pytest.raises(UsageError, match="^vae_tile = .*; allowed are whole numbers from 4 to ") as caught:
            attempt()
        messages.append(str(caught.value))
        assert caught.value.param == "vae_tile"
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("use", "param"),
    [
        (lambda pipe: pipe.decode(SAMPLE, vae_slice="no"), "vae_slice"),
        (lambda pipe: pipe.decode(SAMPLE[:, :3]), "latents"),
        (lambda pipe: pipe.decode(SAMPLE[0]), "latents"),
        (lambda pipe: pipe.decode(SAMPLE.astype(np.float64)), "latents"),
        (lambda pipe: pipe.decode(SAMPLE * np.float32("nan")), "latents"),
        (lambda pipe: pipe.decode(SAMPLE[:0]), "latents"),
        (lambda pipe: pipe.decode("latents"), "latents"),
        (lambda pipe: pipe.decode(None), "latents"),
        (lambda pipe: pipe.preview(SAMPLE[:, :3]), "latents"),
        (lambda pipe: pipe.preview([[1.0]]), "latents"),
        (lambda pipe: pipe.preview(SAMPLE, scale=0), "scale"),
        (lambda pipe: pipe.preview(SAMPLE, scale=1.5), "scale"),
        (lambda pipe: pipe.preview(SAMPLE, scale=10**9), "scale"),
        (lambda pipe: pipe.preview(SAMPLE, output_type=None), "output_type"),
        (lambda pipe: pipe.encode([]), "prompts"),
        (lambda pipe: pipe.encode([1]), "prompts"),
        (lambda pipe: pipe.encode(["a"], prompt_style="A1111"), "prompt_style"),
        (lambda pipe: pipe.encode(["a"], clip_skip=-1), "clip_skip"),
        (lambda pipe: pipe.encode(["a"], clip_skip="1"), "clip_skip"),
        (lambda pipe: pipe("a cat", callback_on_step_end=5), "callback_on_step_end"),
        (lambda pipe: pipe("a cat", callback_on_step_end=int), "callback_on_step_end"),
        (lambda pipe: pipe("a cat", callback_on_step_end=lambda pipe, index: None), "callback_on_step_end"),
        (lambda pipe: pipe.prepare(None), "plan"),
        (lambda pipe: pipe.steps(None), "plan"),
        (lambda pipe: pipe.finish("a cat", SAMPLE), "plan"),
        (lambda pipe: pipe.parameters(None, 0), "plan"),
        (lambda pipe: pipe.parameters(make_plan(pipe.bundle, "a cat", {}), 1), "image"),
        (lambda pipe: pipe.parameters(make_plan(pipe.bundle, "a cat", {}), None), "image"),
        (lambda pipe: sdopt.Pipeline("x"), "pool"),
        (lambda pipe: sdopt.Pipeline(None), "pool"),
        (lambda pipe: EnginePool("sd15"), "bundle"),
        (lambda pipe: sdopt.open_engine("sd15", "unet"), "bundle"),
        (lambda pipe: sdopt.open_engine(None, "unet"), "bundle"),
    ],
)
def test_every_public_method_checks_what_a_call_checks(use: Any, param: str, emoji: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError, match=rf"^{param}( = |: ).*(allowed (are|is)|has 4 channels)") as caught:
        use(emoji)
    assert caught.value.param == param


def test_one_text_is_encoded_as_a_list_of_one(emoji: sdopt.Pipeline) -> None:
    np.testing.assert_array_equal(emoji.encode("a cat"), emoji.encode(["a cat"]))
