"""Every key of a configuration that changes pictures is computed, or refused by name; the others change nothing.

The tables here name every option of the classes that are read. A release of diffusers that adds one fails the first
test, until a line here says what becomes of it.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt.errors import CheckpointError
from sdopt.export import component, describe, families, presets, schedule
from sdopt.export.source import open_folder
from sdopt.samplers import SAMPLERS
from tests import tiny

# the gate of an export compares these with PyTorch: together they have all options that a model computes
UNETS: list[dict[str, Any]] = [
    {
        "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_eps": 1e-3,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 4, "layers_per_block": 1,
        "center_input_sample": True, "flip_sin_to_cos": False, "freq_shift": 1, "mid_block_type": None,
        "only_cross_attention": True, "act_fn": "gelu", "conv_in_kernel": 5, "conv_out_kernel": 5,
        "time_embedding_dim": 16, "time_embedding_act_fn": "silu", "timestep_post_act": "silu",
        "resnet_time_scale_shift": "scale_shift", "resnet_out_scale_factor": 2.0, "use_linear_projection": True,
        "attention_head_dim": 4, "transformer_layers_per_block": 2, "cross_attention_norm": "layer_norm",
        "downsample_padding": 0,
    },
    {
        "block_out_channels": (8,), "down_block_types": ("SimpleCrossAttnDownBlock2D",), "norm_num_groups": 4,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "layers_per_block": 1, "resnet_skip_time_act": True, "mid_block_only_cross_attention": True,
        "time_embedding_type": "fourier", "mid_block_scale_factor": 2.0, "encoder_hid_dim": 20,
        "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 12,
    },
]  # fmt: skip
VAES: list[dict[str, Any]] = [
    {
        "block_out_channels": (6,), "down_block_types": ("DownEncoderBlock2D",), "layers_per_block": 2,
        "up_block_types": ("UpDecoderBlock2D",), "norm_num_groups": 3, "use_quant_conv": False, "act_fn": "gelu",
        "use_post_quant_conv": False, "mid_block_add_attention": False,
    }
]  # fmt: skip
TAESDS: list[dict[str, Any]] = [
    {
        "encoder_block_out_channels": (4,), "decoder_block_out_channels": (4,), "num_encoder_blocks": (2,),
        "num_decoder_blocks": (2,), "act_fn": "gelu", "upsample_fn": "bilinear",
    }
]  # fmt: skip
ENCODERS: list[dict[str, Any]] = [
    {
        "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 70,
        "max_position_embeddings": 9, "hidden_act": "relu", "layer_norm_eps": 1e-2,
    }
]  # fmt: skip

# key -> a value that is refused, and the sentence
REFUSED: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "unet": {
        "class_embed_type": ("timestep", "class_embed_type is 'timestep': it takes class labels"),
        "num_class_embeds": (10, "num_class_embeds is 10: it takes class labels"),
        "encoder_hid_dim_type": ("image_proj", "encoder_hid_dim_type is 'image_proj': it takes pictures"),
        "addition_embed_type": ("text_time", "addition_embed_type is 'text_time': its pipeline class gives .* None"),
        "attention_type": ("gated", "attention_type is 'gated': it takes boxes"),
        "class_embeddings_concat": (True, "class_embeddings_concat is True: it takes class labels"),
        "dual_cross_attention": (True, "dual_cross_attention is True: it takes two texts"),
        "in_channels": (8, "in_channels is 8: its pipeline class gives 4 channels of latents or, with a mask, 9"),
        "out_channels": (8, "out_channels is 8: the latents of the VAE have 4 channels"),
        "cross_attention_dim": (24, "cross_attention_dim is 24: its text encoders give 20 features"),
        "sample_size": ([12], r"sample_size is \[12\]; it must be a whole number of latents"),
    },
    "vae": {
        "in_channels": (4, "in_channels is 4; pictures have 3 channels"),
        "out_channels": (4, "out_channels is 4; pictures have 3 channels"),
        "latent_channels": (8, "the latents of the VAE have 8 channels|in_channels is 4: its pipeline class gives 8"),
        "scaling_factor": (0.0, "scaling_factor is 0.0; it must be a positive number"),
    },
    "taesd": {
        "in_channels": (4, "in_channels is 4; pictures have 3 channels"),
        "out_channels": (4, "out_channels is 4; pictures have 3 channels"),
        "latent_channels": (8, "in_channels is 4: its pipeline class gives 8"),
        "scaling_factor": (-1.0, "scaling_factor is -1.0; it must be a positive number"),
        "upsampling_scaling_factor": (3, "upsampling_scaling_factor is 3; what is exported has 2"),
    },
    "text_encoder": {"hidden_size": (12, "cross_attention_dim is 20: its text encoders give 12 features")},
}
# key -> a value that changes nothing of what these models compute
CHANGES_NOTHING: Mapping[str, Mapping[str, Any]] = {
    "unet": {"dropout": 0.5, "addition_embed_type_num_heads": 2},
    "vae": {"force_upcast": False, "sample_size": 7, "shift_factor": 0.3, "latents_mean": [0.1] * 4},
    "taesd": {"force_upcast": True, "latent_magnitude": 2, "latent_shift": 0.1, "shift_factor": 0.3},
    "text_encoder": {"attention_dropout": 0.5, "bos_token_id": 5, "pad_token_id": 5, "return_dict": False},
}
# key -> the tests that have it
ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "unet": {
        "addition_time_embed_dim": "test_families: SDXL",
        "projection_class_embeddings_input_dim": "test_families: SDXL",
        "reverse_transformer_layers_per_block": "test_families: a small latent consistency model",
        "time_cond_proj_dim": "test_families: latent consistency models",
        "upcast_attention": "test_presets: what overflows in half precision",
        "num_attention_heads": "diffusers refuses it",
    },
    "vae": {"latents_std": "test_families: SDXL's latents with a mean and deviation"},
    "taesd": {},
    "text_encoder": {
        "projection_dim": "test_sdxl",
        "eos_token_id": "test_sdxl: the pooled text",
        "initializer_range": "training",
        "initializer_factor": "training",
    },
}
COMPUTED = {"unet": UNETS, "vae": VAES, "taesd": TAESDS, "text_encoder": ENCODERS}
MAKERS = {"unet": tiny.unet, "vae": tiny.vae, "taesd": tiny.taesd, "text_encoder": tiny.text_encoder}


def options_of(model: str) -> set[str]:
    """The names of all options of a model's class."""
    import diffusers
    from transformers import CLIPTextConfig, PreTrainedConfig

    if model == "text_encoder":
        return {*CLIPTextConfig().to_dict()} - {*PreTrainedConfig().to_dict()} | {"return_dict"}
    name = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "taesd": "AutoencoderTiny"}[model]
    return {*inspect.signature(getattr(diffusers, name).__init__).parameters} - {"self"}


@pytest.mark.parametrize("model", COMPUTED)
def test_every_option_has_its_line(model: str) -> None:
    listed = {
        *(key for changes in COMPUTED[model] for key in changes),
        *REFUSED[model],
        *CHANGES_NOTHING[model],
        *ELSEWHERE[model],
    }
    own = {"model_type"}  # names the class
    assert listed == options_of(model) - own


def edit(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


@pytest.fixture(scope="module")
def with_taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd(tmp_path_factory.mktemp("taesd") / "checkpoint", vae=tiny.taesd())


def folder_of(model: str) -> str:
    return "vae" if model == "taesd" else model


@pytest.mark.parametrize(("model", "key"), [(model, key) for model, keys in REFUSED.items() for key in keys])
def test_what_is_not_exported_is_refused_by_the_name_of_its_key(
    model: str, key: str, tmp_path: Path, tiny_checkpoint: Path, with_taesd: Path
) -> None:
    value, message = REFUSED[model][key]
    source = with_taesd if model == "taesd" else tiny_checkpoint
    copy = tiny.variant(source, tmp_path / "checkpoint")
    edit(copy / folder_of(model) / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=message):
        describe(open_folder(copy, None, {}))


def test_a_unet_without_cross_attention_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    edit(copy / "unet/config.json", **blocks, mid_block_type="UNetMidBlock2D")
    with pytest.raises(CheckpointError, match="down_block_types is .*: it has no cross-attention, so it takes no text"):
        describe(open_folder(copy, None, {}))


@pytest.mark.parametrize(("widths", "fit"), [([20, 20], True), ([20, 24], False)])
def test_all_blocks_take_the_same_text(widths: list[int], fit: bool, tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    edit(copy / "unet/config.json", cross_attention_dim=widths)
    checkpoint = open_folder(copy, None, {})
    if fit:
        part = families.of(checkpoint).builds(checkpoint)["unet"](checkpoint)
        assert part.inputs[2].shape == ("batch", "tokens", 20)
    else:
        with pytest.raises(CheckpointError, match=r"cross_attention_dim is \[20, 24\]: its text encoders give 20"):
            describe(checkpoint)


def test_sdxls_unet_takes_sizes_and_pooled_text(tmp_path: Path, sdxl_checkpoint: Path) -> None:
    copy = tiny.variant(sdxl_checkpoint, tmp_path / "checkpoint")
    edit(copy / "unet/config.json", addition_embed_type=None)
    with pytest.raises(CheckpointError, match="addition_embed_type is None: its pipeline class gives .* 'text_time'"):
        describe(open_folder(copy, None, {}))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0, -0.18215, "0.18215", None, True])
def test_latents_are_scaled_by_a_positive_number(value: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    edit(copy / "vae/config.json", scaling_factor=value)
    with pytest.raises(CheckpointError, match="vae: scaling_factor is .*; it must be a positive number"):
        describe(open_folder(copy, None, {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.1] * 3, "latents_std": [1.0] * 4}, "latents_mean is .*; it must be a list of 4 finite"),
        ({"latents_mean": 0.1, "latents_std": [1.0] * 4}, "latents_mean is 0.1; it must be a list of 4 finite"),
        ({"latents_mean": [0.1] * 4, "latents_std": [1.0, None, 1, 1]}, "latents_std is .*; it must be a list of 4"),
        ({"latents_mean": [0.1] * 4, "latents_std": [1.0, math.inf, 1, 1]}, "latents_std is .*; it must be a list"),
        ({"latents_mean": [0.1] * 4, "latents_std": [1.0, 0.0, 1, 1]}, "latents_std is .*; its numbers must be above"),
    ],
    ids=str,
)
def test_means_and_deviations_of_latents_are_numbers(
    changes: dict, message: str, tmp_path: Path, sdxl_checkpoint: Path
) -> None:
    copy = tiny.variant(sdxl_checkpoint, tmp_path / "checkpoint")
    edit(copy / "vae/config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        describe(open_folder(copy, None, {}))


def test_sdxl_reads_a_mean_only_beside_deviations_and_never_a_shift(tmp_path: Path, sdxl_checkpoint: Path) -> None:
    copy = tiny.variant(sdxl_checkpoint, tmp_path / "checkpoint")
    edit(copy / "vae/config.json", latents_mean=[0.1] * 4, shift_factor=0.3)
    latents = describe(open_folder(copy, None, {})).latents
    assert (latents.scaling_factor, latents.shift_factor) == (0.13025, 0.0)
    edit(copy / "vae/config.json", latents_std=[0.5, 1, 2, 4])
    latents = describe(open_folder(copy, None, {})).latents
    assert latents.shift_factor == (0.1,) * 4
    np.testing.assert_allclose(latents.scaling_factor, 0.13025 / np.array([0.5, 1, 2, 4]))


def outputs(model: str, module: Any) -> list[np.ndarray]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        module.eval()
        if model == "unet":
            return [module(noise(1, 4, 8, 8), 7, noise(1, 5, 20)).sample.numpy()]
        if model == "text_encoder":
            return [module(torch.arange(7)[None], return_dict=True).last_hidden_state.numpy()]
        encoded = module.encode(noise(1, 3, 16, 16))
        latents = encoded.latent_dist.mean if model == "vae" else encoded.latents
        return [latents.numpy(), module.decode(noise(1, 4, 8, 8)).sample.numpy()]


@pytest.mark.parametrize("model", CHANGES_NOTHING)
def test_what_is_said_to_change_nothing_changes_nothing(model: str, tmp_path: Path) -> None:
    plain = outputs(model, MAKERS[model]())
    for key, value in CHANGES_NOTHING[model].items():
        for expected, found in zip(plain, outputs(model, MAKERS[model](**{key: value})), strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=key)


def gated(folder: Path, names: tuple[str, ...], **parts: Any) -> None:
    """Export some components of a checkpoint with these parts; the gate compares them with PyTorch."""
    width = parts["text_encoder"].config.hidden_size if "text_encoder" in parts else 20
    parts.setdefault("unet", tiny.unet(cross_attention_dim=width))
    checkpoint = open_folder(tiny.sd(folder / "checkpoint", **parts), None, {})
    describe(checkpoint)
    (folder / "bundle").mkdir()
    builds = families.of(checkpoint).builds(checkpoint)
    for name in names:
        entries = component.write_component(
            builds[name], checkpoint, folder / "bundle", 23, 80.0, lambda line: None, component.Phases(None, 1)
        )
        assert min(result.psnr_db for entry in entries.values() for result in entry.parity) >= 80


@pytest.mark.parametrize("number", range(len(UNETS)))
def test_a_unet_with_every_option_is_computed(number: int, tmp_path: Path) -> None:
    gated(tmp_path, ("unet",), unet=tiny.unet(**UNETS[number]))


def test_an_autoencoder_with_every_option_is_computed(tmp_path: Path) -> None:
    gated(tmp_path / "kl", ("vae_decoder", "vae_encoder"), vae=tiny.vae(**VAES[0]))
    gated(tmp_path / "tiny", ("vae_decoder", "vae_encoder"), vae=tiny.taesd(**TAESDS[0]))


def test_a_text_encoder_with_every_option_is_computed(tmp_path: Path) -> None:
    gated(tmp_path, ("text_encoder",), text_encoder=tiny.text_encoder(**ENCODERS[0], return_dict=False))


# ------------------------------------------------------------------------------------------------ schedulers

THRESHOLD = "only with thresholding, which is refused"
CLIP = "only with clip_sample, which is refused"
MU = "only with use_dynamic_shifting"
NOT_READ = {  # options of diffusers' schedulers that no sampler reads
    "dynamic_thresholding_ratio": THRESHOLD,
    "sample_max_value": THRESHOLD,
    "clip_sample_range": CLIP,
    "time_shift_type": MU,
    "base_shift": MU,
    "max_shift": MU,
    "base_image_seq_len": MU,
    "max_image_seq_len": MU,
}


NOT_OF_FLOWS = {  # schedules of levels that a flow does not have
    "timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_option_of_a_scheduler_is_read_with_its_default_or_listed(name: str) -> None:
    """The oracle of `tests/samplers` compares those that are read."""
    import diffusers

    entry = SAMPLERS[name]
    parameters = dict(inspect.signature(getattr(diffusers, entry.diffusers).__init__).parameters)
    del parameters["self"]
    not_read = NOT_READ.keys() | (NOT_OF_FLOWS if entry.forced.get("use_flow_sigmas") else set[str]())
    assert parameters.keys() - entry.defaults.keys() <= not_read
    for key, parameter in parameters.items():
        if key in entry.defaults and key != "disable_corrector":  # a list there, a tuple here
            assert entry.defaults[key] == parameter.default, key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "thresholding True cannot be used"),
        ({"num_train_timesteps": 0}, "scheduler.num_train_timesteps is 0; allowed is"),
        ({"beta_start": 0.0}, "scheduler.beta_start is 0.0; allowed is a number above 0 and below 1"),
        ({"beta_end": -0.1}, "scheduler.beta_end is -0.1; allowed is"),
        ({"beta_end": math.inf}, "scheduler.beta_end is 'inf'; allowed is"),
        ({"beta_start": math.nan}, "scheduler.beta_start is 'nan'; allowed is"),
        ({"trained_betas": []}, r"scheduler.trained_betas is \[\]; allowed is"),
        ({"trained_betas": [0.1, 2.0]}, "scheduler.trained_betas"),
        ({"beta_schedule": "cubic"}, "cubic"),
        ({"prediction_type": "image"}, "image"),
        ({"timestep_spacing": "random"}, "random"),
        ({"steps_offset": -1}, "scheduler.steps_offset is -1; allowed is"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type 'learned' cannot be used"),
    ],
    ids=str,
)
def test_a_scheduler_that_no_table_expresses_is_refused_by_the_name_of_its_key(
    changes: dict, message: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    copy = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    edit(copy / "scheduler/scheduler_config.json", **changes)
    if "_class_name" in changes:
        edit(copy / "model_index.json", scheduler=["diffusers", changes["_class_name"]])
    with pytest.raises(CheckpointError, match=message):
        entries(copy)


def entries(folder: Path) -> dict[str, Any]:
    """What the manifest says of a checkpoint's scheduler."""
    checkpoint = open_folder(folder, None, {})
    defaults = presets.defaults(checkpoint, families.of(checkpoint), factor=2)
    return schedule.manifest_entries(checkpoint, folder, defaults, lambda line: None)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("FlowMatchEulerDiscreteScheduler", "flow_prediction"),
        ("IPNDMScheduler", "v_prediction"),
        ("EDMEulerScheduler", "epsilon"),
        ("DDIMScheduler", "epsilon"),
        ("FlowMatchHeunDiscreteScheduler", "flow_prediction"),
    ],
)
def test_a_scheduler_without_the_word_predicts_what_its_class_predicts(name: str, prediction: str) -> None:
    import diffusers

    scheduler_class = getattr(diffusers, name)
    assert schedule.prediction_type(scheduler_class, scheduler_class().config) == prediction
