"""Pictures made from pictures are those that diffusers makes, and what a mask keeps stays."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.files import embedded
from sdopt.engine.pool import EnginePool
from sdopt.errors import UsageError
from sdopt.image import masks
from sdopt.image import pil as images
from sdopt.metrics import psnr
from sdopt.samplers import SAMPLERS
from tests import tiny
from tests.conftest import EMOJI_CHECKPOINT, make_tiny_checkpoint
from tests.test_pipeline import FLOOR_DB, picture_psnr

OPTIONS = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "np"}


@pytest.fixture
def emoji() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as pipe:
        yield pipe


def picture(edge: int, seed: int = 0) -> Image.Image:
    """Smooth colours, no power of two anywhere."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize((edge, edge), Image.Resampling.BICUBIC)


def mask_of(edge: int) -> Image.Image:
    mask = np.zeros((edge, edge), np.uint8)
    mask[edge // 4 : edge // 2 + 3, edge // 3 :] = 255
    return Image.fromarray(mask)


def theirs(kind: str, checkpoint: Path) -> Any:
    import diffusers
    import torch

    pipe = getattr(diffusers, f"StableDiffusion{kind}Pipeline").from_pretrained(
        checkpoint, torch_dtype=torch.float32, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> Any:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def img2img() -> Any:
    return theirs("Img2Img", EMOJI_CHECKPOINT)


@pytest.fixture(scope="module")
def inpaint() -> Any:
    return theirs("Inpaint", EMOJI_CHECKPOINT)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"])
def test_image_to_image_is_that_of_diffusers(name: str, img2img: Any, emoji: sdopt.Pipeline) -> None:
    import diffusers

    own, edge, entry = img2img.scheduler, emoji.bundle.manifest.defaults.height, SAMPLERS[name]
    scheduler = getattr(diffusers, entry.diffusers)
    img2img.scheduler = scheduler.from_config(own.config, clip_sample=False, **entry.forced)
    options = {**OPTIONS, "strength": 0.6, "image": picture(edge)}
    try:
        expected = img2img("a cat", generator=generators(5), **options).images
    finally:
        img2img.scheduler = own
    found = emoji("a cat", seed=5, sampler=name, **options)
    assert picture_psnr(expected, found.images) >= FLOOR_DB
    assert found.parameters[0]["strength"] == 0.6


def test_a_batch_of_pictures_keeps_each_with_its_prompt_and_seed(img2img: Any, emoji: sdopt.Pipeline) -> None:
    edge = emoji.bundle.manifest.defaults.height
    options = {**OPTIONS, "image": [picture(edge, 1), picture(edge, 2)]}
    expected = img2img(["a cat", "a dog"], generator=generators(5, 9), **options).images
    found = emoji(["a cat", "a dog"], seed=[5, 9], **options).images
    assert picture_psnr(expected, found) >= FLOOR_DB
    alone = emoji("a dog", seed=9, **{**options, "image": picture(edge, 2)}).images[0]
    assert picture_psnr(alone, found[1]) >= 80


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("name", ["ddim", "euler", "pndm"])
def test_inpainting_with_a_four_channel_unet_is_that_of_diffusers(
    name: str, strength: float, inpaint: Any, emoji: sdopt.Pipeline
) -> None:
    import diffusers

    own, edge, entry = inpaint.scheduler, emoji.bundle.manifest.defaults.height, SAMPLERS[name]
    inpaint.scheduler = getattr(diffusers, entry.diffusers).from_config(own.config, clip_sample=False)
    options = {**OPTIONS, "strength": strength, "image": picture(edge), "mask_image": mask_of(edge)}
    try:
        expected = inpaint("a cat", generator=generators(5), height=edge, width=edge, **options).images
    finally:
        inpaint.scheduler = own
    assert picture_psnr(expected, emoji("a cat", seed=5, sampler=name, **options).images) >= FLOOR_DB


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DYNAMIC = {**FLOW, "use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3}


@pytest.mark.parametrize("kind", ["Inpaint", "Img2Img"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("config", [FLOW, DYNAMIC], ids=["fixed shift", "dynamic shift"])
def test_pictures_on_a_flow_schedule_are_those_of_diffusers(
    config: dict[str, Any], strength: float, kind: str, request: pytest.FixtureRequest
) -> None:
    """No pipeline of diffusers joins a UNet with a flow schedule: its own one is given the words it lacks."""
    import diffusers
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    bundle = sdopt.Bundle.open(embedded())
    manifest = replace(bundle.manifest, scheduler=config)
    edge, factor = manifest.defaults.height * 2, manifest.latents.factor
    words = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")

    class Flow(diffusers.FlowMatchEulerDiscreteScheduler):
        init_noise_sigma = 1.0

        def add_noise(self, sample: Any, noise: Any, timestep: Any) -> Any:
            return self.scale_noise(sample, timestep, noise)

        def scale_model_input(self, sample: Any, timestep: Any) -> Any:
            return sample

        def set_timesteps(self, steps: int, device: Any = None, **more: Any) -> None:
            mu = calculate_shift((edge // factor) ** 2, *(self.config[word] for word in words))
            super().set_timesteps(steps, device, mu=mu if self.config["use_dynamic_shifting"] else None, **more)

    own = request.getfixturevalue(kind.lower())
    before, own.scheduler = own.scheduler, Flow.from_config(config)
    options = {**OPTIONS, "strength": strength, "image": picture(edge), "output_type": "latent"}
    masked = {"mask_image": mask_of(edge)} if kind == "Inpaint" else {}
    sized = {"height": edge, "width": edge} if kind == "Inpaint" else {}
    try:
        expected = own("a cat", generator=generators(5), **options, **masked, **sized).images.numpy()
    finally:
        own.scheduler = before
    with sdopt.Pipeline(EnginePool(replace(bundle, manifest=manifest))) as pipe:
        found = pipe("a cat", seed=5, **options, **masked, **sized).images
    assert psnr(expected, found) >= FLOOR_DB


def test_a_shift_for_the_size_is_refused_where_the_schedule_has_none(emoji: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError, match="^mu: these noise levels do not depend on the size") as caught:
        emoji("a cat", mu=0.7)
    assert caught.value.param == "mu"


def test_what_the_mask_keeps_stays(emoji: sdopt.Pipeline) -> None:
    edge = emoji.bundle.manifest.defaults.height
    factor = emoji.bundle.manifest.latents.factor
    mask = np.zeros((edge, edge), np.float32)
    mask[:, edge // 2 :] = 1
    options = {**OPTIONS, "image": picture(edge), "mask_image": mask, "output_type": "latent"}
    one, other = (emoji(prompt, seed=5, **options).images for prompt in ("a cat", "a red apple"))
    kept = edge // factor // 2
    np.testing.assert_array_equal(one[..., :kept], other[..., :kept])
    assert np.abs(one[..., kept:] - other[..., kept:]).mean() > 0.1


@pytest.fixture(scope="module")
def inpainting_model(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A nine-channel checkpoint, and its bundle."""
    folder = tmp_path_factory.mktemp("nine")
    checkpoint = make_tiny_checkpoint(folder / "checkpoint", in_channels=9)
    return checkpoint, tiny.export_like(checkpoint, folder / "bundle", tiny_bundle, verify=False)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_with_a_nine_channel_unet_is_that_of_diffusers(
    strength: float, inpainting_model: tuple[Path, Path]
) -> None:
    checkpoint, bundle = inpainting_model
    options = {**OPTIONS, "strength": strength, "image": picture(24), "mask_image": mask_of(24)}
    expected = theirs("Inpaint", checkpoint)("a cat", generator=generators(5), height=24, width=24, **options).images
    with sdopt.load(bundle) as pipe:
        assert picture_psnr(expected, pipe("a cat", seed=5, **options).images) >= FLOOR_DB
        with pytest.raises(UsageError, match="an inpainting model: give image and mask_image"):
            pipe("a cat")


def test_a_picture_sets_the_size_unless_one_is_given(emoji: sdopt.Pipeline) -> None:
    factor = emoji.bundle.manifest.latents.factor
    odd = picture(9 * factor + 1)
    assert emoji("a cat", image=odd, num_inference_steps=2, output_type="np").images.shape[1:3] == (9 * factor,) * 2
    sized = emoji("a cat", image=odd, height=8 * factor, width=10 * factor, num_inference_steps=2, output_type="np")
    assert sized.images.shape[1:3] == (8 * factor, 10 * factor)


def test_arrays_and_pil_images_are_the_same_picture() -> None:
    pil = picture(24)
    array = np.asarray(pil)
    for given in (array, array / np.float32(255)):
        np.testing.assert_allclose(images.to_array(given, 24, 24, 1), images.to_array(pil, 24, 24, 1), atol=1e-6)
    np.testing.assert_array_equal(
        images.to_mask(masks.read(np.asarray(mask_of(24))), 24, 24, 2), images.to_mask(mask_of(24), 24, 24, 2)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_image": mask_of(24)}, "mask_image needs an image"),
        ({"strength": 0.5}, "strength needs an image"),
        ({"image": picture(24), "strength": 1.5}, "strength = 1.5; allowed are numbers from 0 to 1"),
        ({"image": picture(24), "strength": 0.0}, "strength"),
        ({"image": "cat.png"}, "image: got <class 'str'>; allowed are PIL images"),
        ({"image": [picture(24)] * 2}, "image: 2 pictures for 1 images"),
        ({"image": np.full((24, 24, 3), 3.0)}, "an array from 3.0 to 3.0; allowed is 0..1"),
        ({"image": np.full((24, 24, 3), np.nan)}, "allowed is 0..1"),
        ({"image": picture(24), "latents": np.zeros((1, 4, 8, 8), np.float32)}, "image and latents: give one"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_picture_that_does_not_fit_is_refused(emoji: sdopt.Pipeline, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        emoji("a cat", **options)


def test_guidance_in_an_interval_runs_the_other_calls_without(emoji: sdopt.Pipeline) -> None:
    sizes: list[int] = []
    unet = emoji.engine("unet")

    class Counted:
        inputs, outputs = unet.inputs, unet.outputs

        def __call__(self, **arrays: Any) -> Any:
            sizes.append(len(arrays["encoder_hidden_states"]))
            return unet(**arrays)

        def close(self) -> None: ...

    pipe = sdopt.Pipeline(EnginePool(emoji.bundle, given={"unet": Counted()}))
    options = {"seed": 1, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "np"}
    limited = pipe("a cat", guidance_interval=(0.2, 0.7), **options).images
    assert sizes == [1] * 2 + [2] * 5 + [1] * 3
    scales = [1.0] * 2 + [3.0] * 5 + [1.0] * 3
    np.testing.assert_array_equal(limited, emoji("a cat", **{**options, "guidance_scale": scales}).images)
    whole = emoji("a cat", guidance_interval=(0.0, 1.0), **options).images
    np.testing.assert_array_equal(whole, emoji("a cat", **options).images)
    with pytest.raises(UsageError, match="3 scales; give one, or one for each of the 10 calls"):
        emoji("a cat", **{**options, "guidance_scale": [1.0, 2.0, 3.0]})
    with pytest.raises(UsageError, match="guidance_interval = 1.5"):
        emoji("a cat", guidance_interval=(0.0, 1.5), **options)
    for interval in ((0.8, 0.1), (0.5,), 0.5):
        with pytest.raises(UsageError, match="guidance_interval = "):
            emoji("a cat", guidance_interval=interval, **options)


def test_latents_go_out_and_come_back_in(emoji: sdopt.Pipeline) -> None:
    latents = emoji("a cat", seed=1, num_inference_steps=4, output_type="latent").images
    expected = emoji("a cat", seed=1, num_inference_steps=4, output_type="np").images
    np.testing.assert_array_equal(emoji.decode(latents, "np"), expected)


def test_latents_may_take_the_place_of_the_picture(img2img: Any, emoji: sdopt.Pipeline) -> None:
    import torch

    latents = emoji(["a cat", "a dog"], seed=[1, 2], num_inference_steps=4, output_type="latent").images
    options = {**OPTIONS, "strength": 0.5}
    expected = img2img(
        ["a cat", "a dog"], generator=generators(5, 9), image=torch.from_numpy(latents), **options
    ).images
    assert picture_psnr(expected, emoji(["a cat", "a dog"], seed=[5, 9], image=latents, **options).images) >= FLOOR_DB
    one = emoji("a cat", image=latents[:1], num_images_per_prompt=2, seed=5, **options).images
    assert picture_psnr(expected[0], one[0]) >= FLOOR_DB
    for wrong in (latents[:, :3], latents.astype(np.float64), latents * np.float32(np.nan), np.repeat(latents, 2, 0)):
        with pytest.raises(UsageError, match="image: got latents .*; allowed are finite float32"):
            emoji(["a cat", "a dog"], image=wrong, **options)
    with pytest.raises(UsageError, match="mask_blur: image is latents; give the picture itself"):
        emoji("a cat", image=latents[:1], mask_image=mask_of(128), mask_blur=2, **options)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\nbroken"])
def test_a_file_that_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UsageError, match="not a PNG, JPEG or WebP picture"):
        images.open_image(tmp_path / "a.png")


def test_a_picture_too_large_is_refused_by_its_header(tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="9000x9000 pixels; allowed are 64,000,000"):
        images.open_image(tmp_path / "a.png")


def test_the_command_begins_from_a_picture(tmp_path: Path) -> None:
    from tests.conftest import sdopt as command

    picture(100).save(tmp_path / "in.jpg")
    done = command(
        "generate", "a cat", "--image", tmp_path / "in.jpg", "--strength", 0.5, "--steps", 4, "-o", tmp_path / "o.png"
    )
    assert done.returncode == 0, done.stderr
    assert images.read_parameters(tmp_path / "o.png")["strength"] == 0.5
    done = command("generate", "--replay", tmp_path / "o.png", "-o", tmp_path / "again.png")
    assert done.returncode == 2
    assert "--image" in done.stderr
    shutil.rmtree(tmp_path)
