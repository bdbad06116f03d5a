"""Every module of Stable Diffusion 1.5 and SDXL is known by every spelling, on models that have shapes alone."""

from __future__ import annotations

from typing import Any

import pytest

from sdopt.adapters.lora.names import Module, spellings
from sdopt.bundle.original_names import unet_names

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}  # the rest of its configuration is the defaults
SDXL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def unet_parameters(config: dict[str, Any]) -> list[str]:
    """The names of a UNet's parameters."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return [name for name, _ in unet.named_parameters()]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def unet(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[str], frozenset[str]]:
    config = {"sd15": SD15, "sdxl": SDXL}[request.param]
    parameters = unet_parameters(config)
    return config, parameters, frozenset(name.rpartition(".")[0] for name in parameters)


def test_no_two_modules_share_a_spelling_and_each_has_those_of_every_trainer(unet: Any) -> None:
    _, _, paths = unet
    table = spellings({"unet": paths, "text_encoder": ["text_model.encoder.layers.0.self_attn.q_proj"]})
    for path in paths:
        module, underscored = Module("unet", path), path.replace(".", "_")
        for name in (f"lora_unet_{underscored}", f"unet.{path}", path, f"base_model.model.{path}"):
            assert table[name] == module
    linears = [path for path in paths if path.endswith("attn1.to_q")]
    assert linears
    for path in linears:
        old = path.replace("attn1.to_q", "attn1.processor.to_q_lora")
        assert table[old] == table[f"unet.{old}"] == Module("unet", path)


def test_the_original_names_are_those_that_diffusers_converts_from(unet: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config, parameters, paths = unet
    names = unet_names(paths)
    assert None not in names.values()
    assert len(set(names.values())) == len(paths)
    split = {name: name.rpartition(".") for name in parameters}
    marks = {f"model.diffusion_model.{names[path]}.{kind}": name for name, (path, _, kind) in split.items()}
    layers = {"layers_per_block": 2, "class_embed_type": None, **config}
    converted = convert_ldm_unet_checkpoint(marks, layers)
    assert converted == {name: name for name in parameters}


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
def test_text_encoders_have_names_with_and_without_text_model(prefix: str) -> None:
    path = "text_model.encoder.layers.3.self_attn.q_proj"
    table = spellings({"unet": [], "text_encoder": [path]})
    module = Module("text_encoder", path)
    assert table[prefix + path.replace(".", "_")] == module
    assert table[f"{prefix}encoder_layers_3_self_attn_q_proj"] == module
    assert table[f"text_encoder.{path}"] == table["text_encoder.encoder.layers.3.self_attn.q_proj"] == module
    assert table["text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora"] == module


def test_two_text_encoders_are_told_apart() -> None:
    path = "text_model.encoder.layers.0.mlp.fc1"
    table = spellings({"unet": [], "text_encoder": [path], "text_encoder_2": [path, "text_projection"]})
    underscored = path.replace(".", "_")
    assert table[f"lora_te1_{underscored}"].component == "text_encoder"
    assert table[f"lora_te2_{underscored}"].component == "text_encoder_2"
    assert table["lora_te2_text_projection"] == Module("text_encoder_2", "text_projection")
    assert table[f"text_encoder_2.{path}"].component == "text_encoder_2"
