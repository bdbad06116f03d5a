"""Each family's pictures are those that diffusers makes, from the same checkpoint and seeds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.specs import Array
from sdopt.denoise.model import scale_embedding
from sdopt.errors import UsageError
from sdopt.samplers import SAMPLERS
from tests import tiny
from tests.denoise.test_start import generators, mask_of, picture
from tests.test_pipeline import FLOOR_DB, picture_psnr

OPTIONS = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
WIDE = {"height": 24, "width": 32}
XL = "StableDiffusionXL{}Pipeline"


@cache
def theirs(checkpoint: Path, kind: str) -> Any:
    """The checkpoint in diffusers, in a pipeline of the named class."""
    import diffusers
    import torch

    extra = {"add_watermarker": False} if "XL" in kind else {}
    if kind.startswith("StableDiffusion") and "XL" not in kind and "3" not in kind:
        extra = {"safety_checker": None}
    pipe = getattr(diffusers, kind).from_pretrained(checkpoint, torch_dtype=torch.float32, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def ours(bundle: Path) -> sdopt.Pipeline:
    return sdopt.load(bundle)


def tensor(array: Array) -> Any:
    import torch

    return torch.from_numpy(np.array(array))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


# ------------------------------------------------------------------------------------------------ SDXL


@pytest.fixture(scope="module")
def refiner(folder: Path, sdxl_bundle: Path) -> tuple[Path, Path]:
    checkpoint = tiny.refiner(folder / "refiner")
    return checkpoint, tiny.export_like(checkpoint, folder / "refiner-bundle", sdxl_bundle)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_a"])
def test_base_and_refiner_share_the_way_as_in_diffusers(
    sampler: str, sdxl_checkpoint: Path, sdxl_bundle: Path, refiner: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    prompts = ["a cat", "a"]
    base, fine = theirs(sdxl_checkpoint, XL.format("")), theirs(refiner[0], XL.format("Img2Img"))
    entry = SAMPLERS[sampler]
    for pipe in (base, fine):
        scheduler = getattr(diffusers, entry.diffusers).from_config(pipe.scheduler.config, **entry.forced)
        monkeypatch.setattr(pipe, "scheduler", scheduler)
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "negative_prompt": ["b", "c"]}
    begun = {**options, "denoising_end": 0.6, "output_type": "latent"}
    ended = {**options, "denoising_start": 0.6, "output_type": "np"}
    latents = base(prompts, generator=generators(5, 6), **WIDE, **begun).images
    expected = fine(prompts, image=latents, generator=generators(7, 8), **ended).images
    found = ours(sdxl_bundle)(prompts, seed=[5, 6], sampler=sampler, **WIDE, **begun).images
    assert picture_psnr(latents.numpy(), found) >= FLOOR_DB
    picture = ours(refiner[1])(prompts, image=found, seed=[7, 8], sampler=sampler, **ended)
    assert picture.images.shape == (2, 24, 32, 3)
    assert picture_psnr(expected, picture.images) >= FLOOR_DB
    assert picture.parameters[0]["aesthetic_score"] == 6.0


def test_the_refiner_changes_a_picture_as_in_diffusers(refiner: tuple[Path, Path]) -> None:
    pipe = theirs(refiner[0], XL.format("Img2Img"))
    options = {**OPTIONS, "num_inference_steps": 10, "image": picture(24), "negative_prompt": "b"}
    for more in ({}, {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0, "crops_coords_top_left": (2, 3)}):
        expected = pipe("a cat", generator=generators(5), **options, **more).images
        assert picture_psnr(expected, ours(refiner[1])("a cat", seed=5, **options, **more).images) >= FLOOR_DB
    manifest = ours(refiner[1]).bundle.manifest
    assert [encoder.component for encoder in manifest.conditioning.encoders] == ["text_encoder_2"]
    assert set(manifest.tokenizers) == {"tokenizer_2"}
    assert "text_encoder" not in manifest.components
    assert manifest.conditioning.time_ids[-1] == "aesthetic_score"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denoising_end": 1.0}, "denoising_end = 1.0; allowed are numbers above 0 and below 1"),
        ({"denoising_end": 0.01}, "denoising_end 0.01 of 5 calls leaves nothing to do"),
        ({"denoising_start": 0.5}, "denoising_start needs an image"),
        ({"denoising_start": 0.999, "image": picture(24)}, "denoising_start 0.999 of 5 calls leaves nothing to do"),
        ({"denoising_start": 0.5, "denoising_end": 0.5, "image": picture(24)}, "the start comes before the end"),
        ({"image": np.zeros((1, 3, 24, 24), np.float32)}, r"allowed are finite float32 \(1, 4, 24, 24\)"),
        ({"image": np.zeros((1, 4, 12, 12), np.float32), "height": 48}, r"allowed are finite float32 \(1, 4, 24, 12\)"),
        ({"negative_target_size": (24, 24)}, "in text to image give both, or neither"),
        ({"aesthetic_score": "high"}, "aesthetic_score = 'high'"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_a_wrong_share_of_the_way_is_refused(options: dict, message: str, sdxl_bundle: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ours(sdxl_bundle)("a", **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "more",
    [
        {},  # diffusers' own strength of 0.3
        {"strength": 0.7, "negative_original_size": (10, 20), "crops_coords_top_left": (2, 3)},
        {"strength": 0.9, "denoising_end": 0.5},
        {"denoising_start": 0.5},  # a picture that is taken for noisy
    ],
    ids=lambda m: ",".join(m) or "plain",
)
def test_sdxl_changes_pictures_as_in_diffusers(more: dict, sdxl_checkpoint: Path, sdxl_bundle: Path) -> None:
    pipe = theirs(sdxl_checkpoint, XL.format("Img2Img"))
    options = {**OPTIONS, "num_inference_steps": 8, "negative_prompt": ["b", "c"], **more}
    options["image"] = [picture(24).resize((32, 24)), picture(24, 1).resize((32, 24))]
    expected = pipe(["a cat", "a"], generator=generators(5, 6), **options).images
    found = ours(sdxl_bundle)(["a cat", "a"], seed=[5, 6], **options).images
    assert found.shape == expected.shape == (2, 24, 32, 3)
    assert picture_psnr(expected, found) >= FLOOR_DB


@pytest.fixture(scope="module")
def nine(folder: Path, sdxl_bundle: Path) -> tuple[Path, Path]:
    """SDXL's inpainting model, whose UNet takes the mask."""
    checkpoint = tiny.sdxl(folder / "nine", XL.format("Inpaint"), unet=tiny.unet_xl(in_channels=9))
    return checkpoint, tiny.export_like(checkpoint, folder / "nine-bundle", sdxl_bundle)


@pytest.mark.parametrize("more", [{}, {"strength": 1.0}, {"strength": 0.6}, {"denoising_start": 0.4}], ids=str)
@pytest.mark.parametrize("channels", [4, 9])
def test_sdxl_inpaints_as_diffusers_does(
    channels: int, more: dict, sdxl_checkpoint: Path, sdxl_bundle: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint, bundle = (sdxl_checkpoint, sdxl_bundle) if channels == 4 else request.getfixturevalue("nine")
    options = {**OPTIONS, "image": [picture(24), picture(24, 1)], "mask_image": mask_of(24), **more}
    pipe = theirs(checkpoint, XL.format("Inpaint"))
    images = {"image": tensor(np.stack([np.asarray(p, np.float32) / 127.5 - 1 for p in options["image"]])
                              .transpose(0, 3, 1, 2))}  # fmt: skip
    expected = pipe(["a cat", "a"], generator=generators(5, 6), height=24, width=24, **{**options, **images}).images
    found = ours(bundle)(["a cat", "a"], seed=[5, 6], **options).images
    assert picture_psnr(expected, found) >= FLOOR_DB


def test_latents_are_inpainted_as_in_diffusers(sdxl_checkpoint: Path, sdxl_bundle: Path, nine: Any) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 12, 12), np.float32)
    options = {**OPTIONS, "mask_image": mask_of(24), "denoising_start": 0.4}
    pipe = theirs(sdxl_checkpoint, XL.format("Inpaint"))
    expected = pipe("a", image=tensor(latents), generator=generators(5), height=24, width=24, **options).images
    assert picture_psnr(expected, ours(sdxl_bundle)("a", image=latents, seed=5, **options).images) >= FLOOR_DB
    with pytest.raises(UsageError, match="latents cannot be masked"):
        ours(nine[1])("a", image=latents, seed=5, **options)


def test_a_familys_strengths_and_guidance_are_those_of_its_pipelines(sdxl_bundle: Path, nine: Any) -> None:
    plain, inpainting = (ours(b).bundle.manifest.defaults for b in (sdxl_bundle, nine[1]))
    assert (plain.strength, plain.inpaint_strength, plain.guidance_scale) == (0.3, 0.9999, 5.0)
    assert inpainting.guidance_scale == 7.5


def test_a_long_weighted_prompt_reaches_sdxl_as_its_embeddings_reach_diffusers(
    sdxl_checkpoint: Path, sdxl_bundle: Path
) -> None:
    prompt, pipe = "a (b:1.4) c d e f g [h] apple", ours(sdxl_bundle)
    (hidden, pooled), (empty, none) = (pipe._text.encode([(t, t)], "a1111") for t in (prompt, "x (y:0.5) z a b c d"))
    given = {"prompt_embeds": hidden, "pooled_prompt_embeds": pooled}
    given |= {"negative_prompt_embeds": empty, "negative_pooled_prompt_embeds": none}
    assert hidden.shape == (1, 14, 32)
    expected = theirs(sdxl_checkpoint, XL.format(""))(
        **{name: tensor(array) for name, array in given.items()}, generator=generators(5), **WIDE, **OPTIONS
    ).images
    found = pipe(prompt, negative_prompt="x (y:0.5) z a b c d", prompt_style="a1111", seed=5, **WIDE, **OPTIONS)
    assert picture_psnr(expected, found.images) >= FLOOR_DB


def test_latents_with_a_mean_and_deviation_of_each_channel_are_those_of_diffusers(
    folder: Path, sdxl_checkpoint: Path, sdxl_bundle: Path
) -> None:
    """As playground-v2.5's VAE has them."""
    checkpoint = tiny.variant(sdxl_checkpoint, folder / "channels")
    config = json.loads((checkpoint / "vae/config.json").read_text())
    config |= {"latents_mean": [-0.1, 0.2, 0.3, -0.4], "latents_std": [0.5, 0.6, 1.7, 0.8]}
    (checkpoint / "vae/config.json").write_text(json.dumps(config))
    pipe = ours(tiny.export_like(checkpoint, folder / "channels-bundle", sdxl_bundle))
    expected = theirs(checkpoint, XL.format(""))("a cat", generator=generators(5), **WIDE, **OPTIONS).images
    assert picture_psnr(expected, pipe("a cat", seed=5, **WIDE, **OPTIONS).images) >= FLOOR_DB
    options = {**OPTIONS, "image": picture(24), "strength": 0.5}
    expected = theirs(checkpoint, XL.format("Img2Img"))("a cat", generator=generators(5), **options).images
    assert picture_psnr(expected, pipe("a cat", seed=5, **options).images) >= FLOOR_DB


# ------------------------------------------------------------------------------------------------ Stable Diffusion 2


@pytest.fixture(scope="module")
def sd2(sd2_checkpoint: Path, sd2_bundle: Path) -> tuple[Path, Path]:
    return sd2_checkpoint, sd2_bundle


def test_sd2_predicts_velocity_as_in_diffusers(sd2: tuple[Path, Path]) -> None:
    options = {**OPTIONS, **WIDE, "num_images_per_prompt": 2, "negative_prompt": "b"}
    expected = theirs(sd2[0], "StableDiffusionPipeline")("a cat", generator=generators(5, 6), **options).images
    assert picture_psnr(expected, ours(sd2[1])("a cat", seed=5, **options).images) >= FLOOR_DB
    manifest = ours(sd2[1]).bundle.manifest
    assert manifest.prediction_type == "v_prediction"
    assert manifest.tokenizers["tokenizer"].pad_token_id == tiny.tokenizer("!").pad_token_id
    prompt = "a (b:1.4) c d e f g [h] apple"
    given = {"prompt_embeds": ours(sd2[1]).encode([prompt], "a1111")}
    given["negative_prompt_embeds"] = np.tile(ours(sd2[1]).encode([""]), (1, 2, 1))
    tensors = {name: tensor(array) for name, array in given.items()}
    expected = theirs(sd2[0], "StableDiffusionPipeline")(**tensors, generator=generators(5), **OPTIONS).images
    found = ours(sd2[1])(prompt, prompt_style="a1111", seed=5, **OPTIONS).images
    assert picture_psnr(expected, found) >= FLOOR_DB


def test_an_autoencoder_without_posterior_encodes_as_in_diffusers(sd2: tuple[Path, Path]) -> None:
    """TAESD draws no noise for its latents; so all later draws come earlier."""
    options = {**OPTIONS, "image": [picture(24), picture(24, 1)], "strength": 0.7}
    pair = ["a cat", "a"]
    expected = theirs(sd2[0], "StableDiffusionImg2ImgPipeline")(pair, generator=generators(5, 6), **options).images
    assert picture_psnr(expected, ours(sd2[1])(pair, seed=[5, 6], **options).images) >= FLOOR_DB
    options = {**OPTIONS, "image": picture(24), "mask_image": mask_of(24), "strength": 0.7, "height": 24, "width": 24}
    expected = theirs(sd2[0], "StableDiffusionInpaintPipeline")("a", generator=generators(5), **options).images
    assert picture_psnr(expected, ours(sd2[1])("a", seed=5, **options).images) >= FLOOR_DB
    bundle = ours(sd2[1]).bundle
    assert [spec.name for spec in bundle.component("vae_encoder").outputs] == ["mean"]
    assert bundle.manifest.latents.scaling_factor == 0.9


# ------------------------------------------------------------------------------------------------ Turbo


@pytest.fixture(scope="module", params=["sd-turbo", "sdxl-turbo"])
def turbo(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Path, Path]:
    """A checkpoint under the name of a Turbo, with its scheduler: trailing, at most 4 steps."""
    import diffusers

    name: str = request.param
    xl = name.startswith("sdxl")
    first = request.getfixturevalue("sdxl_checkpoint") if xl else request.getfixturevalue("sd2")[0]
    bundle = request.getfixturevalue("sdxl_bundle") if xl else request.getfixturevalue("sd2")[1]
    kind = diffusers.EulerAncestralDiscreteScheduler if xl else diffusers.EulerDiscreteScheduler
    scheduler = kind(**tiny.BETAS, timestep_spacing="trailing")
    checkpoint = tiny.variant(first, folder / name, scheduler, _name_or_path=f"stabilityai/{name}")
    return "StableDiffusion{}" + "XL" * xl, checkpoint, tiny.export_like(checkpoint, folder / f"{name}-bundle", bundle)


def test_turbo_is_one_step_without_guidance(turbo: tuple[str, Path, Path]) -> None:
    kind, checkpoint, bundle = turbo[0].replace("{}", ""), *turbo[1:]
    pipe = theirs(checkpoint, f"{kind}Pipeline")
    options = {"guidance_scale": 0.0, "output_type": "np"}
    plain = ours(bundle)("a cat", seed=5, output_type="np")
    expected = pipe("a cat", generator=generators(5), num_inference_steps=1, height=24, width=24, **options).images
    assert picture_psnr(expected, plain.images) >= FLOOR_DB
    assert plain.parameters[0]["num_inference_steps"] == 1
    more = {**options, "num_inference_steps": 4, "num_images_per_prompt": 2, **WIDE}
    expected = pipe("a cat", generator=generators(5, 6), **more).images
    assert picture_psnr(expected, ours(bundle)("a cat", seed=5, **more).images) >= FLOOR_DB


def test_turbo_changes_a_picture_where_steps_times_strength_reach_one(turbo: tuple[str, Path, Path]) -> None:
    kind, checkpoint, bundle = f"{turbo[0].replace('{}', '')}Img2ImgPipeline", *turbo[1:]
    options = {"image": picture(24), "num_inference_steps": 2, "strength": 0.5, "guidance_scale": 0.0}
    options["output_type"] = "np"
    expected = theirs(checkpoint, kind)("a cat", generator=generators(5), **options).images
    assert picture_psnr(expected, ours(bundle)("a cat", seed=5, **options).images) >= FLOOR_DB
    message = "strength 0.4 of 2 steps leaves nothing to do.*Use strength 0.5 or more, or 3 steps or more"
    with pytest.raises(UsageError, match=message):
        ours(bundle)("a cat", seed=5, **{**options, "strength": 0.4})
    with pytest.raises(UsageError, match=r"strength 0\.0 of 2 steps leaves nothing to do.*0\.5 or more\.$"):
        ours(bundle)("a cat", seed=5, **{**options, "strength": 0.0})


# ------------------------------------------------------------------------------------------------ LCM

LATENT = "LatentConsistencyModel{}Pipeline"


@pytest.fixture(scope="module")
def lcm(folder: Path, tiny_bundle: Path) -> tuple[Path, Path]:
    from diffusers import LCMScheduler

    told = tiny.unet(time_cond_proj_dim=6)
    checkpoint = tiny.sd(folder / "lcm", LATENT.format(""), unet=told, scheduler=LCMScheduler(**tiny.BETAS))
    return checkpoint, tiny.export_like(checkpoint, folder / "lcm-bundle", tiny_bundle)


def test_lcm_is_told_the_guidance_as_in_diffusers(lcm: tuple[Path, Path]) -> None:
    pipe = theirs(lcm[0], LATENT.format(""))
    plain = ours(lcm[1])("a cat", seed=5, output_type="np")
    assert (plain.parameters[0]["num_inference_steps"], plain.parameters[0]["guidance_scale"]) == (4, 8.5)
    expected = pipe("a cat", generator=generators(5), height=24, width=24, output_type="np").images
    assert picture_psnr(expected, plain.images) >= FLOOR_DB
    options = {"guidance_scale": 1.5, "num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "np", **WIDE}
    expected = pipe("a cat", generator=generators(5, 6), **options).images
    found, other = (
        picture_psnr(expected, ours(lcm[1])("a cat", seed=5, **{**options, "guidance_scale": scale}).images)
        for scale in (1.5, 4.0)
    )
    assert found >= max(FLOOR_DB, other + 20)
    with pytest.raises(UsageError, match="negative_prompt: this model takes the guidance scale as an input"):
        ours(lcm[1])("a cat", negative_prompt="b")


@pytest.mark.parametrize("strength", [0.8, 0.3, 1.0])
def test_lcm_changes_a_picture_in_all_its_steps(strength: float, lcm: tuple[Path, Path]) -> None:
    options = {"image": [picture(24), picture(24, 1)], "strength": strength, "output_type": "np"}
    expected = theirs(lcm[0], LATENT.format("Img2Img"))(["a cat", "a"], generator=generators(5, 6), **options).images
    found = ours(lcm[1])(["a cat", "a"], seed=[5, 6], **options)
    assert picture_psnr(expected, found.images) >= FLOOR_DB
    with pytest.raises(UsageError, match=r"4 steps are too many; .*strength 0.05 leaves 2 of them"):
        ours(lcm[1])("a cat", **{**options, "image": picture(24), "strength": 0.05})


def test_the_guidance_embedding_is_that_of_diffusers(lcm: tuple[Path, Path]) -> None:
    import torch

    embed = theirs(lcm[0], LATENT.format("")).get_guidance_scale_embedding
    for w, width in ((7.5, 256), (0.0, 256), (6.999, 7)):
        expected = embed(torch.tensor([w]), embedding_dim=width).numpy()[0]
        np.testing.assert_allclose(scale_embedding(w, width), expected, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_plain_lcm_is_guided_as_any_other_model(
    scale: float, folder: Path, tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    """As a model with LCM-LoRA fused: an ordinary UNet with LCM's scheduler."""
    from diffusers import LCMScheduler

    bundle, checkpoint = folder / f"plain-lcm-{scale}-bundle", folder / f"plain-lcm-{scale}"
    tiny.variant(tiny_checkpoint, checkpoint, LCMScheduler(**tiny.BETAS))
    pipe = ours(tiny.export_like(checkpoint, bundle, tiny_bundle))
    defaults = pipe.bundle.manifest.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.strength_cuts) == (4, 1.0, "steps")
    options = {"guidance_scale": scale, "num_inference_steps": 4, "output_type": "np", "negative_prompt": "b"}
    expected = theirs(checkpoint, "StableDiffusionPipeline")("a cat", generator=generators(5), **WIDE, **options).images
    assert picture_psnr(expected, pipe("a cat", seed=5, **WIDE, **options).images) >= FLOOR_DB
    options |= {"image": picture(24), "strength": 0.6}
    expected = theirs(checkpoint, "StableDiffusionImg2ImgPipeline")("a cat", generator=generators(5), **options).images
    assert picture_psnr(expected, pipe("a cat", seed=5, **options).images) >= FLOOR_DB


def test_a_small_unet_that_is_an_lcm_too_is_that_of_diffusers(folder: Path, sdxl_bundle: Path) -> None:
    """As lcm-ssd-1b: no middle block, transformers of different depth, and SDXL told the guidance scale."""
    checkpoint = tiny.small_lcm(folder / "small-lcm")
    pipe = ours(tiny.export_like(checkpoint, folder / "small-lcm-bundle", sdxl_bundle))
    options = {"num_inference_steps": 4, "guidance_scale": 8.5, "output_type": "np"}
    expected = theirs(checkpoint, XL.format(""))(["a cat", "a"], generator=generators(5, 6), **WIDE, **options).images
    assert picture_psnr(expected, pipe(["a cat", "a"], seed=[5, 6], **WIDE, output_type="np").images) >= FLOOR_DB
    options |= {"strength": 0.6, "image": picture(24)}
    expected = theirs(checkpoint, XL.format("Img2Img"))("a cat", generator=generators(5), **options).images
    assert picture_psnr(expected, pipe("a cat", seed=5, **options).images) >= FLOOR_DB
