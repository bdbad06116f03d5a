"""A UNet that the exporter does not fit is refused in words, by its configuration, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdopt.errors import CheckpointError
from sdopt.export import export, families
from sdopt.export.source import open_folder
from tests import tiny

EVEN_ONLY = {
    "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (12, 28),
}
UNETS: dict[str, tuple[Callable[[], Any], str]] = {
    "class labels": (lambda: tiny.unet(num_class_embeds=10), "num_class_embeds is 10: it takes class labels"),
    "projected class labels": (
        lambda: tiny.unet(class_embed_type="projection", projection_class_embeddings_input_dim=8),
        "class_embed_type is 'projection': it takes class labels",
    ),
    "no text": (
        lambda: tiny.unet(
            down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
            mid_block_type="UNetMidBlock2D",
        ),
        "has no cross-attention, so it takes no text",
    ),
    "even sizes alone": (
        lambda: tiny.unet(**EVEN_ONLY), r"does not take latents of every size \(11 x 13\).*diffusers says: "
    ),
    "text of another width": (
        lambda: tiny.unet(cross_attention_dim=24), "cross_attention_dim is 24: its text encoders give 20"
    ),
    "a second picture": (lambda: tiny.unet(in_channels=8), "in_channels is 8: its pipeline class gives 4 channels"),
    "a learnt variance": (lambda: tiny.unet(out_channels=8), "out_channels is 8: the latents of the VAE have 4"),
    "pooled text": (lambda: tiny.unet_xl(cross_attention_dim=20), "addition_embed_type is 'text_time': its pipeline"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_of_another_kind_is_refused_before_its_weights_are_read(name: str, tmp_path: Path) -> None:
    make, message = UNETS[name]
    folder, lines = tiny.sd(tmp_path / "sd", unet=make()), list[str]()
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(CheckpointError, match=message) as error:
        export(folder, tmp_path / "bundle", report=lines.append)
    assert str(folder / "unet") in str(error.value)
    assert not lines
    assert not (tmp_path / "bundle").exists()


def test_an_sdxl_unet_with_other_sizes_is_refused(tmp_path: Path) -> None:
    folder = tiny.sdxl(tmp_path / "xl", unet=tiny.unet_xl(5))
    with pytest.raises(CheckpointError, match="or needs other inputs; such models are not exported. diffusers says"):
        export(folder, tmp_path / "bundle", report=lambda line: None)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sd2, tiny.sdxl, tiny.refiner, tiny.small_lcm])
def test_the_models_that_are_exported_pass(make: Callable[[Path], Path], tmp_path: Path) -> None:
    checkpoint = open_folder(make(tmp_path / "folder"), None, {})
    families.of(checkpoint).require_supported(checkpoint)


def test_a_unet_that_projects_the_text_takes_what_the_encoder_gives(tmp_path: Path) -> None:
    unet = tiny.unet(encoder_hid_dim=20, encoder_hid_dim_type="text_proj", cross_attention_dim=24)
    checkpoint = open_folder(tiny.sd(tmp_path / "folder", unet=unet), None, {})
    families.of(checkpoint).require_supported(checkpoint)


def test_a_configuration_that_its_class_cannot_read_is_named(tmp_path: Path) -> None:
    folder = tiny.sd(tmp_path / "sd")
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [12]}))
    with pytest.raises(CheckpointError, match=r"unet.config.json: unet cannot be made of it: "):
        export(folder, tmp_path / "bundle", report=lambda line: None)
