"""A ControlNet in one file is the folder that it was made from, it is recognised, and nothing of it is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from sdopt.bundle.adapter import open_adapter
from sdopt.bundle.files import Bundle
from sdopt.errors import CheckpointError, UsageError
from sdopt.export.one_model import open_model
from sdopt.export.onto import add_adapter
from sdopt.export.single_file import adapter, convert, names
from sdopt.export.single_file.file import SingleFile
from sdopt.export.single_file.published import UNET, UNET_2, UNET_XL
from sdopt.graph import load
from sdopt.graph.names import parameter, parameters
from tests.adapters import relatives as nets
from tests.export import ldm

CLASSES = ("ControlNetModel", "ControlNetUnionModel")
SMALL_XL = {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}
FULL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # published ControlNets: name, UNet, what is their own
    "sd1": ("sd1", UNET, {}),
    "sd2": ("sd2", UNET_2, {}),
    "sdxl": ("sdxl-base", UNET_XL, {}),
    "sdxl, the small one": ("sdxl-base", UNET_XL, SMALL_XL),  # diffusers/controlnet-depth-sdxl-1.0-small
    "sdxl, the middle one": ("sdxl-base", UNET_XL, {"transformer_layers_per_block": [1, 1, 1]}),  # ...-mid
    "sd1, of five channels": ("sd1", UNET, {"conditioning_channels": 5}),
}


def full(unet: dict[str, Any], own: dict[str, Any]) -> Any:
    """A ControlNet in full size, without weights."""
    with torch.device("meta"):
        base = ControlNetModel.from_unet(UNet2DConditionModel.from_config(dict(unet)), load_weights_from_unet=False)
        return ControlNetModel.from_config({**base.config, **own})


@pytest.mark.parametrize("prefix", ["control_model.", "", None])
@pytest.mark.parametrize("case", FULL)
def test_a_published_one_in_full_size_is_recognised_and_every_tensor_has_its_place(
    case: str, prefix: str | None, tmp_path: Path
) -> None:
    published, unet, own = FULL[case]
    model = full(unet, own)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = names.own if prefix is None else names.controlnet
    places = {name: f"{prefix or ''}{origins[0].name}" for name, origins in layout(shapes).items()}
    assert len(set(places.values())) == len(shapes)
    path = ldm.write_header({places[name]: shape for name, shape in shapes.items()}, tmp_path / "net.safetensors")
    file = SingleFile.open(path)
    name, config = adapter.configuration(file, prefix or "")
    assert name == published
    with torch.device("meta"):
        made = ControlNetModel.from_config(dict(config))
    assert {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()} == shapes
    for key in ("attention_head_dim", "addition_embed_type", "upcast_attention", "conditioning_channels"):
        value = unet.get(key) if key in unet else model.config[key]
        assert made.config[key] == value, key
    plan = convert.plan(file, {"net": shapes}, {"net": (names.Layout(prefix or "", layout),)}, "")
    assert {name: origin.name for name, origin in plan["net"].items()} == places


PUBLISHED_UNION = {  # config.json of xinsir/controlnet-union-sdxl-1.0 and its ProMax, where it differs from the UNet's
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "num_trans_channel": 320,
    "num_trans_head": 8,
    "num_trans_layer": 1,
    "num_proj_channel": 320,
}


@pytest.mark.parametrize("modes", [6, 8])
def test_a_published_union_in_full_size_is_recognised_and_every_tensor_has_its_place(
    modes: int, tmp_path: Path
) -> None:
    base = full(UNET_XL, {}).config
    given = {key: base[key] for key in base if key not in ("mid_block_type", "_class_name")}
    with torch.device("meta"):
        model = ControlNetUnionModel.from_config({**given, **PUBLISHED_UNION, "num_control_type": modes})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    file = SingleFile.open(ldm.write_header(shapes, tmp_path / "diffusion_pytorch_model_promax.safetensors"))
    name, config = adapter.configuration(file, "")
    assert (name, config["_class_name"]) == ("sdxl-base", "ControlNetUnionModel")
    with torch.device("meta"):
        made = ControlNetUnionModel.from_config(dict(config))
    assert {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()} == shapes
    assert made.config["num_control_type"] == modes
    for key in ("num_attention_heads", "attention_head_dim", "addition_embed_type", "num_trans_head", "act_fn"):
        assert made.config[key] == model.config[key], key
    plan = convert.plan(file, {"net": shapes}, {"net": (names.Layout("", names.own),)}, "")
    assert {name: origin.name for name, origin in plan["net"].items()} == dict(zip(shapes, shapes, strict=True))


@pytest.mark.parametrize("unet", [UNET, UNET_2], ids=["sd1", "sd2"])
def test_the_names_are_those_that_diffusers_reads(unet: dict[str, Any]) -> None:
    model = full(unet, {})
    ours = {name: origins[0].name for name, origins in names.controlnet(list(model.state_dict())).items()}
    theirs = convert_controlnet_checkpoint({place: place for place in ours.values()}, {"layers_per_block": 2})
    assert {name: place for name, place in theirs.items() if place is not None} == ours


@pytest.fixture(scope="module")
def net(tiny_checkpoint: Path) -> Any:
    return nets.controlnet(UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet"))


@pytest.fixture(scope="module")
def folder(net: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "folder"
    net.save_pretrained(path)
    return path


BASE = {"model.diffusion_model.out.0.weight": torch.zeros(2), "cond_stage_model.logit_scale": torch.zeros(1)}
WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "of the original code": nets.original,
    "of the original code, without the prefix": lambda net: nets.original(net, ""),
    "of the original code, beside the base model": lambda net: {**BASE, **nets.original(net)},
    "of diffusers": lambda net: dict(net.state_dict()),
    "of diffusers, in half precision": lambda net: {name: tensor.half() for name, tensor in net.state_dict().items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_the_folder_that_it_was_made_from(way: str, net: Any, folder: Path, tmp_path: Path) -> None:
    path = nets.save(WAYS[way](net), tmp_path / "net.safetensors")
    with open_model(str(path), CLASSES, config=str(folder)) as checkpoint:
        ours = checkpoint.load("").state_dict()
    rounds = "half" in way
    theirs = {name: tensor.half().float() if rounds else tensor for name, tensor in net.state_dict().items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_adapter_of_a_file_is_that_of_its_folder(net: Any, folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    path, own = (
        nets.save(nets.original(net), tmp_path / "net.safetensors"),
        shutil.copytree(tiny_bundle, tmp_path / "b"),
    )
    made = add_adapter(path, own, "of-a-file", config=folder, offline=True, report=lambda line: None)
    plain = add_adapter(folder, own, "of-a-folder", offline=True, report=lambda line: None)
    for there in (made, plain):
        weights = parameters(load(there / "controlnet.onnx"))
        assert weights.keys() == net.state_dict().keys()
        assert all(np.array_equal(parameter(weights[name]), tensor) for name, tensor in net.state_dict().items())
    source = open_adapter(Bundle.open(own), "of-a-file").manifest.source
    assert source == {"file": "net.safetensors"}


def test_without_a_configuration_it_is_that_of_the_published_model(net: Any, tmp_path: Path) -> None:
    path = nets.save(dict(net.state_dict()), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="whose text has 20 features; published models have 768, 1024 or 2048"):
        adapter.configuration(SingleFile.open(path), "")


@pytest.mark.parametrize(
    ("name", "pooled"), [("control_v11e_sd15_shuffle", True), ("sd15-Shuffle.fp16", True), ("reshuffled", False)]
)
def test_the_name_of_a_file_tells_the_one_that_pools_its_residuals(name: str, pooled: bool, tmp_path: Path) -> None:
    model = full(UNET, {})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    path = ldm.write_header(shapes, tmp_path / f"{name}.safetensors")
    assert adapter.configuration(SingleFile.open(path), "")[1]["global_pool_conditions"] == pooled


def test_all_that_does_not_fit_is_listed(net: Any, folder: Path, tmp_path: Path) -> None:
    tensors = nets.original(net)
    tensors["control_model.time_embed.9.weight"] = tensors.pop("control_model.time_embed.0.weight")
    tensors["control_model.zero_convs.0.0.bias"] = torch.zeros(5)
    path = nets.save(tensors, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError) as error, open_model(str(path), CLASSES, config=str(folder)):
        pass
    message = str(error.value)
    assert "lack control_model.time_embed.0.weight (controlnet's time_embedding.linear_1.weight)" in message
    assert "have control_model.time_embed.9.weight, which the model does not have" in message
    assert "zero_convs.0.0.bias is (5,), controlnet's controlnet_down_blocks.0.bias is (12,)" in message


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("lora_unet_down.lora_up.weight", "is a LoRA; load it"),
        ("lllite_unet_input_blocks_4.conditioning1.0.weight", "is a ControlNet-LLLite, which is not exported"),
        ("model.diffusion_model.input_blocks.0.0.weight", "is a whole model; to make a bundle of it"),
        ("difference", "holds differences from a base model"),
        ("ip_adapter.1.to_k_ip.weight", "is an IP-Adapter"),
        ("banana", "has no ControlNet .* it has banana"),
    ],
)
def test_what_another_file_is_is_said(tensor: str, says: str, tmp_path: Path) -> None:
    path = nets.save({tensor: torch.zeros(4, 4)}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=says), open_model(str(path), CLASSES):
        pass


def test_pickles_broken_files_and_options_of_other_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(b"no header")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "is not a safetensors file": ("net.safetensors", {}),
        "is a pickle file. Pickle files can run code": ("net.pth", {}),
        "there is no such folder or file": ("nothing", {}),
        "its class is AutoencoderKL; what can be added": ("net.safetensors", {"config": str(tmp_path / "other")}),
    }
    for says, (name, options) in cases.items():
        with pytest.raises(CheckpointError, match=says), open_model(str(tmp_path / name), CLASSES, **options):
            pass
    with pytest.raises(UsageError, match=r"revision = 'main': .* is one file, and only an id on the hub takes it"):
        open_model(str(tmp_path / "net.safetensors"), CLASSES, revision="main").__enter__()
    with pytest.raises(UsageError, match="config = 'x': .* is a folder, and only a single file takes it"):
        open_model(str(folder), CLASSES, config="x").__enter__()


def test_a_tensor_of_integers_is_refused(net: Any, folder: Path, tmp_path: Path) -> None:
    tensors = {**nets.original(net), "control_model.time_embed.0.bias": torch.zeros(48, dtype=torch.int8)}
    path = nets.save(tensors, tmp_path / "net.safetensors")
    with (
        pytest.raises(CheckpointError, match=r"not floating point numbers: control_model.time_embed.0.bias \(I8\)"),
        open_model(str(path), CLASSES, config=str(folder)),
    ):
        pass
