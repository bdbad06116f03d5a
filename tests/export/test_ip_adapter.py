"""IP-Adapters as they are published become adapters of a bundle; what is not one of these is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdopt.bundle.adapter import IMAGE_PROMPTED, open_adapter
from sdopt.bundle.files import Bundle
from sdopt.errors import BundleError, CheckpointError, UsageError
from sdopt.export.blocks.image_encoder import CLASS, pixels
from sdopt.export.blocks.image_prompt import variants
from sdopt.export.checkpoint import MODEL, Checkpoint
from sdopt.export.onto import add_adapter
from sdopt.graph.image_prompt import in_order
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image encoder, as the authors publish it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.image_encoder(folder / "image_encoder")
    return folder


def refused(file: Path, bundle: Path, message: str, **options: Any) -> None:
    there = sorted((bundle / "adapters").glob("*"))
    with pytest.raises(CheckpointError) as caught:
        add_adapter(file, bundle, "face", report=lambda line: None, **options)
    assert message in str(caught.value)
    assert sorted((bundle / "adapters").glob("*")) == there


def test_a_layer_of_every_patch_is_exported(tiny_checkpoint: Path, tiny_bundle: Path, folder: Path) -> None:
    own = Path(shutil.copytree(tiny_bundle, folder / "full-bundle"))
    file = tiny.ip_adapter(folder / "ip-adapter-full-face.safetensors", tiny_checkpoint, "full")
    lines: list[str] = []
    add_adapter(file, own, "face", report=lines.append)
    adapter = open_adapter(Bundle.open(own), "face")
    projection = adapter.component("image_projection")
    assert projection.outputs[0].shape[:2] == ("pictures", 10)  # a token for each of 3 x 3 patches, and one for all
    assert adapter.manifest.image_prompt is not None
    assert adapter.manifest.image_prompt.patches
    assert [line.split()[0] for line in lines] == ["component", "image_projection", "image_encoder"]


NAMES: list[tuple[str, str, dict[str, Any]]] = [
    ("its files lack ip_adapter.3.to_v_ip.weight", "base", {"ip_adapter.3.to_v_ip.weight": None}),
    ("lack image_proj.norm.bias", "base", {"image_proj.norm.bias": None}),
    ("lack image_proj.layers.2.attn.to_k.weight", "plus", {"image_proj.layers.2.0.to_kv.weight": None}),
    ("have image_proj.extra, which", "base", {"image_proj.extra": torch.zeros(2)}),
    ("have other.weight, which", "plus", {"other.weight": torch.zeros(2)}),
    ("of another shape: ip_adapter.1.to_k_ip.weight [5, 20]", "base",
     {"ip_adapter.1.to_k_ip.weight": torch.zeros(5, 20)}),
    ("not floating point numbers: image_proj.norm.bias", "base", {"image_proj.norm.bias": torch.zeros(20).int()}),
    ("image_proj.norm.bias has NaN", "base", {"image_proj.norm.bias": torch.full((20,), torch.nan)}),
    ("is an IP-Adapter FaceID:", "base", {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(2)}),
    ("FaceID Plus:", "plus", {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(2)}),
    ("it has none of image_proj.proj.weight", "base", {"image_proj.proj.weight": None}),
    ("UNet with 5 cross-attentions, and that of the bundle has 4", "base",
     {f"ip_adapter.9.to_{x}_ip.weight": torch.zeros(12, 20) for x in "kv"}),
    ("whose heads have 64 features", "plus", {"image_proj.layers.0.0.to_q.weight": torch.zeros(100, 12)}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "kind", "others"), NAMES, ids=[name for name, _, _ in NAMES])
def test_every_tensor_is_accounted_for(
    tiny_checkpoint: Path, tiny_bundle: Path, folder: Path, message: str, kind: str, others: dict[str, Any]
) -> None:
    file = tiny.ip_adapter(folder / "odd.safetensors", tiny_checkpoint, kind, **others)
    refused(file, tiny_bundle, message)


def test_an_adapter_of_another_model_is_refused(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    sdxl = tmp_path / "sdxl"
    tiny.unet_xl().save_pretrained(sdxl / "unet")
    file = tiny.ip_adapter(folder / "ip-adapter_sdxl.safetensors", sdxl)
    refused(file, tiny_bundle, "It is made for another model, or its file is damaged")


def test_sources_that_cannot_be_read_are_refused(tiny_checkpoint: Path, tiny_bundle: Path, folder: Path) -> None:
    refused(folder / "ip-adapter.bin", tiny_bundle, "is a pickle. Pickle files can run code")
    refused(folder / "none.safetensors", tiny_bundle, "there is no such file; give the .safetensors file")
    (folder / "odd.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    refused(folder / "odd.safetensors", tiny_bundle, "is not a safetensors file")
    tiny.ip_adapter(folder / "ip-adapter_sd15.safetensors", tiny_checkpoint)
    refused(folder, tiny_bundle, "name the file, e.g.")


def test_the_command_that_converts_a_pickle_does_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    from safetensors.torch import load_file

    from sdopt.export.ip_adapter import CONVERT

    tensors = load_file(tiny.ip_adapter(tmp_path / "a.safetensors", tiny_checkpoint))
    parts = {part: {k[len(part) + 1 :]: t for k, t in tensors.items() if k.startswith(part)} for part in
             ("image_proj", "ip_adapter")}  # fmt: skip
    torch.save(parts, tmp_path / "old.bin")
    command = CONVERT.format(old=tmp_path / "old.bin", new=tmp_path / "new.safetensors").removeprefix('python -c "')
    subprocess.run([sys.executable, "-c", command.removesuffix('"')], check=True)
    made = load_file(tmp_path / "new.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in tensors.items())


def test_the_image_encoder_is_named_where_it_is_not_beside_the_file(
    tiny_checkpoint: Path, tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    file = tiny.ip_adapter(tmp_path / "ip-adapter.safetensors", tiny_checkpoint)
    refused(file, tiny_bundle, "needs an image encoder, and")
    refused(file, tiny_bundle, "there is no such folder", image_encoder="/nowhere")
    refused(
        file, tiny_bundle, "is a model of the type 'clip_text_model'", image_encoder=tiny_checkpoint / "text_encoder"
    )
    narrow = tiny.image_encoder(tmp_path / "narrow", projection_dim=8)
    refused(file, tiny_bundle, "it reads 16 features of a picture, and the image encoder gives 8", image_encoder=narrow)
    with pytest.raises(UsageError, match="is no file of an IP-Adapter, and only these need one"):
        add_adapter(tiny_checkpoint, tiny_bundle, "face", image_encoder=narrow)


PREPROCESSORS: dict[str, dict[str, Any]] = {
    "do_resize": {"do_resize": False},
    "do_normalize": {"do_normalize": False},
    "rescale_factor": {"rescale_factor": 1 / 127.5},
    "size": {"size": {"shortest_edge": 9}},
    "crop_size": {"crop_size": {"height": 18, "width": 9}},
    "image_mean": {"image_mean": [0.5]},
    "image_std": {"image_std": [0.5, 0.5, 0.0]},
    "resample": {"resample": 9},
    "do_center_crop": {"do_center_crop": False},
}


@pytest.mark.parametrize("key", PREPROCESSORS)
def test_another_preparation_of_pictures_is_refused_by_its_key(folder: Path, tmp_path: Path, key: str) -> None:
    own = Path(shutil.copytree(folder / "image_encoder", tmp_path / "image_encoder"))
    config = {"size": {"shortest_edge": 18}, "crop_size": 18, **PREPROCESSORS[key]}
    (own / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json: {key} is "):
        pixels(Checkpoint(own, {MODEL: CLASS}))


def test_the_preparation_of_pictures_is_that_of_the_encoder(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder / "image_encoder", tmp_path / "image_encoder"))
    assert pixels(Checkpoint(own, {MODEL: CLASS})).shortest_edge == 18
    config = {"size": {"height": 18, "width": 18}, "crop_size": 18, "resample": 2, "image_mean": [0.5, 0.5, 0.5]}
    (own / "preprocessor_config.json").write_text(json.dumps(config))
    made = pixels(Checkpoint(own, {MODEL: CLASS}))
    assert (made.shortest_edge, made.resample, made.mean) == (None, 2, (0.5, 0.5, 0.5))


def test_layers_are_in_the_order_in_which_diffusers_numbers_them() -> None:
    model = tiny.unet(
        block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=2, attention_head_dim=2,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"), transformer_layers_per_block=11,
    )  # fmt: skip
    numbered = [name.removesuffix(".processor") for name in model.attn_processors if "attn2" in name]
    assert in_order(reversed([name for name, _ in model.named_parameters()])) == numbered


def test_a_unet_of_other_attentions_has_no_variant_for_image_prompts() -> None:
    from sdopt.export.part import Part

    model = tiny.unet(
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", addition_embed_type=None,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    module = torch.nn.Module()
    module.model = model
    assert variants(Part("unet_controlled", module, (), (), ({},)), ()) == ()


def test_a_bundle_of_an_earlier_sdopt_is_exported_again(tiny_checkpoint: Path, tiny_bundle: Path, folder: Path) -> None:
    own = Path(shutil.copytree(tiny_bundle, folder / "old-bundle"))
    manifest = json.loads((own / "manifest.json").read_text())
    del manifest["components"][IMAGE_PROMPTED]
    (own / "manifest.json").write_text(json.dumps(manifest))
    file = tiny.ip_adapter(folder / "ip-adapter_old.safetensors", tiny_checkpoint)
    with pytest.raises(BundleError, match="has no component unet_ip_adapter: an earlier sdopt has written it"):
        add_adapter(file, own, "face")
