"""A configuration is what classes and pipelines of diffusers hold after from_pretrained, not what its JSON says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.files import Bundle
from sdopt.errors import CheckpointError
from sdopt.export import describe, families
from sdopt.export.source import open_folder
from sdopt.request.sampling import make_table
from sdopt.samplers import SAMPLERS, find_sampler
from sdopt.samplers.options import merged
from tests import tiny
from tests.conftest import edit_manifest
from tests.export.test_configurations import edit, entries, options_of


def held(folder: Path, kind: str) -> Any:
    """The pipeline of diffusers, with what its constructor corrected."""
    import diffusers

    extra = {} if "XL" in kind else {"safety_checker": None}
    return getattr(diffusers, kind).from_pretrained(folder, **extra)


SD, INPAINT, LCM = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline"


@pytest.mark.parametrize(
    ("kind", "name", "changes", "drop"),
    [
        (SD, "PNDMScheduler", {"steps_offset": 0}, ()),
        (SD, "PNDMScheduler", {}, ("steps_offset", "skip_prk_steps")),
        (SD, "DDIMScheduler", {}, ("clip_sample", "steps_offset")),
        (SD, "DDIMScheduler", {"clip_sample": True}, ()),
        (SD, "EulerDiscreteScheduler", {}, ("beta_schedule", "beta_start", "beta_end", "steps_offset")),
        ("StableDiffusionImg2ImgPipeline", "DDIMScheduler", {"steps_offset": 3}, ("clip_sample",)),
        (INPAINT, "PNDMScheduler", {"steps_offset": 0}, ("skip_prk_steps",)),
        (INPAINT, "PNDMScheduler", {"skip_prk_steps": False}, ()),
        (INPAINT, "DDIMScheduler", {"clip_sample": False}, ("steps_offset",)),
        (LCM, "LCMScheduler", {"steps_offset": 0}, ()),
        (LCM, "LCMScheduler", {}, ("beta_schedule", "original_inference_steps")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_scheduler_is_what_the_pipeline_of_diffusers_holds(
    kind: str, name: str, changes: dict, drop: tuple[str, ...], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """The scheduler_config.json is of another class than model_index.json names, which decides."""
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint", _class_name=kind)
    edit(copy / "model_index.json", scheduler=["diffusers", name])
    edit(copy / "scheduler/scheduler_config.json", drop, **changes)
    scheduler = held(copy, kind).scheduler
    found = entries(copy)
    assert (type(scheduler).__name__, scheduler.config.prediction_type) == (name, found["prediction_type"])
    options, _ = merged(SAMPLERS[find_sampler(name)[0].name].defaults, found["scheduler"])
    for key, value in options.items():
        if key != "clip_sample" or name != "LCMScheduler":
            assert scheduler.config.get(key, value) == value, key


@pytest.mark.parametrize("kind", [INPAINT, "StableDiffusionXLPipeline", LCM])
@pytest.mark.parametrize("drop", [(), ("clip_sample",)])
def test_samples_that_the_pipeline_clips_are_refused(
    kind: str, drop: tuple[str, ...], tmp_path: Path, tiny_checkpoint: Path, sdxl_checkpoint: Path
) -> None:
    """Their pipelines leave clip_sample as it is, which is true by default."""
    source = sdxl_checkpoint if "XL" in kind else tiny_checkpoint
    copy = tiny.variant(source, tmp_path / "checkpoint", _class_name=kind)
    edit(copy / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edit(copy / "scheduler/scheduler_config.json", drop, **({} if drop else {"clip_sample": True}))
    assert held(copy, kind).scheduler.config.clip_sample is True
    with pytest.raises(CheckpointError, match='clip_sample True cannot be used: .* Set "clip_sample" to false'):
        entries(copy)


@pytest.mark.parametrize("version", ["0.6.0", "0.8.9", "0.9.0.dev0", "0.9.0", "0.10.1", "0.42.0", None])
@pytest.mark.parametrize("size", [12, 63, 96])
@pytest.mark.parametrize("kind", [SD, INPAINT, LCM])
def test_the_size_of_an_early_checkpoint_is_that_of_the_pipeline(
    kind: str, size: int, version: str | None, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint", _class_name=kind)
    edit(copy / "unet/config.json", ("_diffusers_version",), sample_size=size)
    if version is not None:
        edit(copy / "unet/config.json", _diffusers_version=version)
    pipe = held(copy, kind)
    found = describe(open_folder(copy, None, {})).defaults
    assert found.height == found.width == pipe.unet.config.sample_size * pipe.vae_scale_factor


def test_defaults_of_absent_keys_are_those_of_the_classes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    edit(copy / "vae/config.json", ("scaling_factor", "latent_channels", "in_channels", "out_channels"))
    edit(copy / "unet/config.json", ("in_channels", "out_channels", "mid_block_type"))
    edit(copy / "text_encoder/config.json", ("num_hidden_layers",))
    checkpoint, pipe = open_folder(copy, None, {}), held_config(copy)
    latents = describe(checkpoint).latents
    assert (latents.channels, latents.scaling_factor) == (pipe["vae"].latent_channels, pipe["vae"].scaling_factor)
    for name in ("unet", "vae"):
        config = checkpoint.config(name)
        assert {key: config[key] for key in options_of(name)} == {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in pipe[name].items()
            if key in options_of(name)
        }
    assert checkpoint.config("text_encoder")["num_hidden_layers"] == pipe["text_encoder"].num_hidden_layers == 12


def held_config(folder: Path) -> dict[str, Any]:
    """The configurations as the classes hold them; this checkpoint's weights no longer fit."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    made = {
        name: kind.from_config(kind.load_config(folder / name)).config
        for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
    }
    return {**made, "text_encoder": CLIPTextConfig.from_pretrained(folder / "text_encoder")}


def test_a_mask_that_only_the_whole_clip_has_is_not_read(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """As transformers reads it: what stands outside of text_config is not the text encoder's."""
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    path = copy / "text_encoder/config.json"
    text = {**json.loads(path.read_text()), "model_type": "clip_text_model"}
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": text, "vision_config": {}}
    for outside, inside in ((True, False), (False, True)):
        text["use_attention_mask"], whole["use_attention_mask"] = inside, outside
        path.write_text(json.dumps(whole))
        pipe = held(copy, SD)
        checkpoint = open_folder(copy, None, {})
        part = families.of(checkpoint).builds(checkpoint)["text_encoder"](checkpoint)
        masks = getattr(pipe.text_encoder.config, "use_attention_mask", False)
        assert masks is inside
        assert ("end_position" in [spec.name for spec in part.inputs]) is masks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FlaxStableDiffusionPipeline"}, "pipeline class 'FlaxStableDiffusionPipeline' is not known"),
        (
            {"unet": ["diffusers", "FlaxUNet2DConditionModel"]},
            "unet is diffusers.FlaxUNet2DConditionModel;",
        ),
        ({"vae": ["diffusers", "FlaxAutoencoderKL"]}, "vae is diffusers.FlaxAutoencoderKL; sdopt reads"),
        ({"text_encoder": ["transformers", "FlaxCLIPTextModel"]}, "text_encoder is transformers.FlaxCLIPTextModel;"),
    ],
    ids=str,
)
def test_models_of_flax_are_refused_by_name(changes: dict, message: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_folder(copy, None, {})


def test_a_scheduler_of_flax_is_read_as_its_torch_class(tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    edit(copy / "model_index.json", scheduler=["diffusers", "FlaxPNDMScheduler"])
    edit(copy / "scheduler/scheduler_config.json", _class_name="FlaxPNDMScheduler")
    assert entries(copy)["scheduler"] == entries(tiny_checkpoint)["scheduler"]


def test_each_component_is_read_in_the_variant_that_it_has(tmp_path: Path, tiny_checkpoint: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    plain = copy / "unet/diffusion_pytorch_model.safetensors"
    half = {key: 2 * tensor.half() for key, tensor in load_file(plain).items()}  # another model beside the plain one
    save_file(half, plain.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(copy, variant="fp16", safety_checker=None)
    checkpoint = open_folder(copy, "fp16", {})
    for name in ("unet", "vae", "text_encoder"):
        theirs = getattr(pipe, name).float().state_dict()
        for key, tensor in checkpoint.load(name).state_dict().items():
            assert torch.equal(tensor, theirs[key]), f"{name}.{key}"


@pytest.mark.parametrize("kind", [SD, INPAINT])
@pytest.mark.parametrize("drop", [(), ("skip_prk_steps",)])
def test_a_request_with_a_mask_takes_no_runge_kutta_steps(
    kind: str, drop: tuple[str, ...], tmp_path: Path, tiny_checkpoint: Path, bundle_copy: Path
) -> None:
    """StableDiffusionInpaintPipeline sets skip_prk_steps, whatever pipeline the checkpoint names; the others do not."""
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint", _class_name=kind)
    edit(copy / "scheduler/scheduler_config.json", drop, **({} if drop else {"skip_prk_steps": False}))
    edit_manifest(bundle_copy, scheduler=entries(copy)["scheduler"])
    opened = Bundle.open(bundle_copy, verify=False)
    for masked, pipeline in ((False, kind), (True, INPAINT)):
        scheduler = held(copy, pipeline).scheduler
        scheduler.set_timesteps(8)
        table = make_table(opened, {"num_inference_steps": 8}, masked=masked)
        assert table.timestep.tolist() == scheduler.timesteps.tolist()
