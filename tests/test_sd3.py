"""Stable Diffusion 3's pictures are those that diffusers makes: three encoders or two, flow matching, a transformer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.cli.main import main
from sdopt.errors import UsageError
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from tests import tiny
from tests.test_families import theirs
from tests.test_pipeline import FLOOR_DB, ON_CPUS, picture_psnr
from tests.test_sdxl import generators

T2I, I2I, INPAINT = (f"StableDiffusion3{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
WIDE = {"height": 24, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 11}
HIGH = {**WIDE, "height": 28, "width": 20}
SHADES = np.random.default_rng(0).random((24, 32, 3), np.float32)
PICTURE = Image.fromarray((SHADES * 255).astype(np.uint8))
MASK = Image.new("L", (32, 24))
MASK.paste(255, (8, 6, 20, 18))


@pytest.fixture(scope="module", params=ON_CPUS)
def pipe(request: pytest.FixtureRequest, sd3_bundle: Path) -> sdopt.Pipeline:
    return sdopt.load(sd3_bundle, request.param)


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative_prompt": "b"},
        HIGH,
        {"prompt_2": "a dog", "prompt_3": "b c", "negative_prompt": "x", "negative_prompt_2": "u",
         "negative_prompt_3": "cat", "max_sequence_length": 9},
        {"guidance_scale": 1.0},
        {"clip_skip": 1},
    ],
    ids=lambda options: ",".join(options) or "plain",
)  # fmt: skip
def test_the_picture_is_the_one_that_diffusers_makes(options: Any, sd3_checkpoint: Path, pipe: sdopt.Pipeline) -> None:
    options = {**WIDE, **options}
    several = {name: [value] * 2 if "prompt" in name else value for name, value in options.items()}
    expected = theirs(sd3_checkpoint, T2I)(
        ["a cat", "an apple or a long text"], generator=generators(5, 6), output_type="np", **several
    ).images
    found = pipe(["a cat", "an apple or a long text"], seed=[5, 6], output_type="np", **options).images
    assert found.shape == expected.shape
    assert picture_psnr(expected, found) >= FLOOR_DB


SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
OTHERS = {
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_dpmpp_2m": ("DPMSolverMultistepScheduler", SOLVER),
}  # StableDiffusion3Pipeline gives flow_dpmpp_2m_sde no generator: tests/samplers compares it


@pytest.mark.parametrize("name", OTHERS)
def test_every_sampler_of_flows_makes_the_picture_of_its_scheduler(
    name: str, sd3_checkpoint: Path, pipe: sdopt.Pipeline
) -> None:
    import diffusers

    reference = theirs(sd3_checkpoint, T2I)
    (kind, options), own = OTHERS[name], reference.scheduler
    reference.scheduler = getattr(diffusers, kind).from_config(own.config, **options)
    try:
        expected = reference("a cat", generator=generators(5), output_type="np", **WIDE).images
    finally:
        reference.scheduler = own
    assert picture_psnr(expected, pipe("a cat", seed=5, sampler=name, output_type="np", **WIDE).images) >= FLOOR_DB


@pytest.mark.parametrize("strength", [0.6, 0.5, 1.0])  # 0.6 of 4 steps is a part of a step
def test_a_picture_becomes_the_one_that_diffusers_makes(
    strength: float, sd3_checkpoint: Path, pipe: sdopt.Pipeline
) -> None:
    options = {**WIDE, "strength": strength, "image": PICTURE, "output_type": "np"}
    expected = theirs(sd3_checkpoint, I2I)("a cat", generator=generators(5), **options).images
    assert picture_psnr(expected, pipe("a cat", seed=5, **options).images) >= FLOOR_DB


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_masked_picture_becomes_the_one_that_diffusers_makes(
    strength: float, sd3_checkpoint: Path, pipe: sdopt.Pipeline
) -> None:
    """As latents: StableDiffusion3InpaintPipeline of diffusers 0.42 decodes them without the shift of the VAE."""
    options = {**WIDE, "strength": strength, "mask_image": MASK, "image": PICTURE, "output_type": "latent"}
    several = {**options, "image": [PICTURE] * 2, "mask_image": [MASK] * 2}
    expected = theirs(sd3_checkpoint, INPAINT)(["a cat", "b"], generator=generators(5, 6), **several).images.numpy()
    assert psnr(expected, pipe(["a cat", "b"], seed=[5, 6], **options).images) >= FLOOR_DB


def test_an_image_of_a_batch_is_the_image_made_alone(sd3_bundle: Path) -> None:
    with sdopt.load(sd3_bundle) as pipe:
        together = pipe(["a cat", "b"], seed=[5, 6], negative_prompt=["", "c"], output_type="np", **WIDE)
        for i, prompt in enumerate(["a cat", "b"]):
            again = {key: together.parameters[i][key] for key in ("negative_prompt", "seed", *WIDE)}
            assert picture_psnr(pipe(prompt, output_type="np", **again).images[0], together.images[i]) >= 100


def test_without_t5_zeros_stand_in_its_place(tmp_path: Path, sd3_bundle: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    small = tiny.sd3(tmp_path / "checkpoint", text_encoder_3=None, tokenizer_3=None)
    pipeline = StableDiffusion3Pipeline.from_pretrained(small, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    with sdopt.load(tiny.export_like(small, tmp_path / "bundle", sd3_bundle)) as pipe:
        assert "text_encoder_3" not in pipe.bundle.components
        for options in ({}, {"negative_prompt": "b", "max_sequence_length": 7}):
            options = {**WIDE, **options, "output_type": "np"}
            expected = pipeline("a cat", generator=generators(5), **options).images
            assert picture_psnr(expected, pipe("a cat", seed=5, **options).images) >= FLOOR_DB
        with pytest.raises(UsageError, match="prompt_3 has no effect: this model has no third text encoder"):
            pipe("a cat", prompt_3="b", seed=5, **WIDE)


def test_given_embeddings_take_the_place_of_the_prompt(sd3_checkpoint: Path, sd3_bundle: Path) -> None:
    encoded = theirs(sd3_checkpoint, T2I).encode_prompt(
        "a cat", None, None, negative_prompt="b", max_sequence_length=11
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with sdopt.load(sd3_bundle) as pipe:
        given: Any = dict(zip(names, (tensor.detach().numpy() for tensor in encoded), strict=True))
        text = pipe("a cat", negative_prompt="b", seed=5, output_type="np", **WIDE).images
        options = {name: value for name, value in WIDE.items() if name != "max_sequence_length"}
        assert picture_psnr(text, pipe(**given, seed=5, output_type="np", **options).images) >= FLOOR_DB
        with pytest.raises(UsageError, match="max_sequence_length has no effect: the embeddings that are given"):
            pipe(**given, seed=5, **WIDE)


def test_weights_of_words_change_what_every_encoder_gives(sd3_bundle: Path) -> None:
    with sdopt.load(sd3_bundle) as pipe:
        plain, loud = (pipe.encode([text], prompt_style="a1111") for text in ("a cat", "a (cat:1.5)"))
        clip = pipe.bundle.manifest.tokenizers["tokenizer"].max_length
        assert plain.shape == loud.shape
        assert np.abs(plain - loud)[:, :clip].max() > 0.1
        assert np.abs(plain - loud)[:, clip:].max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 14}, "max_sequence_length = 14; this model's text encoder reads up to 13 tokens"),
        ({"height": 26}, "height = 26; this model makes multiples of 4 pixels: 24 or 28"),
        ({"height": 60}, "height = 60; allowed are whole numbers from 4 to 56"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale has no effect: this model is guided by guidance_scale"),
        ({"sampler": "ddim"}, "ddim cannot sample this checkpoint"),
        ({"sampler": "flow_heun", "mu": 0.5}, "mu: these noise levels do not depend on the size"),
        ({"cache_interval": 2}, "cache_interval: a feature cache .* this model has a transformer"),
        ({"skip_guidance_layers": [1]}, "skip_guidance_layers: sdopt calls the whole transformer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options: Any, message: str, sd3_bundle: Path) -> None:
    with sdopt.load(sd3_bundle) as pipe, pytest.raises(UsageError, match=message):
        pipe("a cat", seed=1, **{**WIDE, **options})


def test_a_tiny_autoencoder_decodes(tmp_path: Path, sd3_checkpoint: Path, sd3_bundle: Path) -> None:
    model = tiny.taesd(latent_channels=16).eval()
    model.save_pretrained(tmp_path / "taesd3")
    bundle = Path(shutil.copytree(sd3_bundle, tmp_path / "bundle"))
    add_adapter(tmp_path / "taesd3", bundle, "tiny", report=lambda line: None, offline=True)
    reference = theirs(sd3_checkpoint, T2I)
    own, reference.vae = reference.vae, model
    try:
        expected = reference("a cat", generator=generators(5), output_type="np", **WIDE).images
    finally:
        reference.vae = own
    with sdopt.load(bundle) as pipe:
        found = pipe("a cat", seed=5, vae="tiny", output_type="np", **WIDE).images
    assert picture_psnr(expected, found) >= FLOOR_DB


def test_an_embedding_is_refused_by_name(sd3_bundle: Path) -> None:
    with sdopt.load(sd3_bundle) as pipe, pytest.raises(UsageError, match="no embedding is for all of them"):
        pipe.load_embedding({"clip_l": np.zeros((1, 12), np.float32)}, "<me>")


def test_inspect_names_every_part_with_its_shapes(sd3_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(sd3_bundle)]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "float32 [" in line]
    told = {line[16:31].strip(): line[49:].strip() for line in table}
    assert told == {
        "text encoder": "input_ids int32 [batch, tokens] -> last_hidden_state float32 [batch, tokens, 36]",  # the last
        "image encoder": "sample float32 [batch, 3, height, width] -> mean float32 [batch, 16, latent_height, "
        "latent_width]; logvar float32 [batch, 16, latent_height, latent_width]",
        "noise": "noise float32 [images, 16, latent_height, latent_width]",
        "denoiser": "sample float32 [batch, 16, latent_height, latent_width]; timestep float32 [batch]; "
        "encoder_hidden_states float32 [batch, tokens, 36]; text_embeds float32 [batch, 28] -> "
        "noise_pred float32 [batch, 16, latent_height, latent_width]",
        "decoder": "latent_sample float32 [batch, 16, latent_height, latent_width] -> "
        "sample float32 [batch, 3, height, width]",
    }
