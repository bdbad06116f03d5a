"""A Control-LoRA becomes the ControlNet that it was made of, and what does not fit the bundle's UNet is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from sdopt.bundle.adapter import open_adapter
from sdopt.bundle.files import Bundle
from sdopt.errors import CheckpointError
from sdopt.export.onto import add_adapter
from sdopt.export.single_file import adapter, control_lora, names
from sdopt.export.single_file.file import SingleFile
from sdopt.graph import load
from sdopt.graph.names import parameter, parameters
from tests.adapters import relatives as nets

RANK = 5
OWN = ("controlnet_",)  # how the names of what no UNet has begin
Tensors = dict[str, Any]


def original_names(net: Any) -> dict[str, str]:
    """The name in the original code of each parameter of a ControlNet."""
    numbered = {name: torch.full(tensor.shape, float(i)) for i, (name, tensor) in enumerate(net.state_dict().items())}
    by_number = {int(tensor.flatten()[0]): name for name, tensor in nets.original(_Numbered(numbered), "").items()}
    return {name: by_number[i] for i, name in enumerate(numbered)}


class _Numbered:
    """Tensors in place of a model's."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def state_dict(self) -> Tensors:
        return self.tensors


def trained(net: Any, unet: Any) -> tuple[Tensors, Tensors]:
    """(the tensors of a Control-LoRA, those of the ControlNet that it is, merged by PyTorch)."""
    rng = torch.Generator().manual_seed(4)
    weights, base, places = {**net.state_dict()}, unet.state_dict(), original_names(net)
    stored: Tensors = {"lora_controlnet": torch.zeros(0)}
    for i, name in enumerate(sorted(weights)):
        there, tensor = places[name], weights[name]
        if name.startswith(OWN):
            stored[there] = tensor
        elif i % 7 == 0:  # one that was not trained
            weights[name] = base[name]
        elif tensor.ndim == 1 or i % 11 == 0:
            weights[name] = stored[there] = base[name] + torch.randn(tensor.shape, generator=rng) * 0.1
        else:
            rank = min(RANK, tensor.shape[0], tensor.shape[1])
            kernel = (1, 1) if tensor.ndim == 4 else ()
            up = torch.randn((tensor.shape[0], rank, *kernel), generator=rng) * 0.1
            down = torch.randn((rank, *tensor.shape[1:]), generator=rng) * 0.1
            module = there.removesuffix(".weight")
            stored |= {f"{module}.up": up, f"{module}.down": down}
            weights[name] = base[name] + (up.flatten(1) @ down.flatten(1)).reshape(tensor.shape)
    return {name: tensor.contiguous() for name, tensor in stored.items()}, weights


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensors, Any]:
    """A bundle of its own, the folder with the ControlNet's configuration, the Control-LoRA, and the ControlNet."""
    fixtures = {"sd": ("tiny_checkpoint", "tiny_bundle"), "sdxl": ("sdxl_checkpoint", "sdxl_bundle")}[request.param]
    checkpoint, bundle = (request.getfixturevalue(name) for name in fixtures)
    folder = tmp_path_factory.mktemp("control-lora")
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    hint = (16, 32) if unet.config.cross_attention_dim == 20 else (6, 10)
    net = nets.awake(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint))
    net.save_pretrained(folder / "net")
    stored, weights = trained(net, unet)
    return Path(shutil.copytree(bundle, folder / "bundle")), folder / "net", stored, weights


def test_every_weight_is_the_unets_and_the_product(case: tuple[Path, Path, Tensors, Any], tmp_path: Path) -> None:
    bundle, config, stored, expected = case
    pairs = [name for name in stored if name.endswith(".up")]
    assert len(pairs) > 10
    assert {stored[name].ndim for name in pairs} == {2, 4}
    path = nets.save(stored, tmp_path / "control-lora-canny-rank128.safetensors")
    target = add_adapter(path, bundle, "canny", config=config, report=lambda line: None)
    made = parameters(load(target / "controlnet.onnx"))
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.allclose(parameter(made[name]), tensor.numpy(), rtol=0, atol=1e-6), name
    opened = open_adapter(Bundle.open(bundle), "canny")
    assert opened.manifest.source == {"file": path.name, "merged_with": Bundle.open(bundle).digest}
    assert min(result.psnr_db for result in opened.component("controlnet").parity) >= 80
    shutil.rmtree(target)


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_a_file_without_its_mark_in_half_precision_and_behind_a_prefix(
    case: tuple[Path, Path, Tensors, Any], prefix: str, tmp_path: Path
) -> None:
    bundle, _, stored, expected = case
    half = {prefix + name: tensor.half() for name, tensor in stored.items() if name != control_lora.MARK}
    file = SingleFile.open(nets.save(half, tmp_path / "file.safetensors"))
    assert control_lora.is_control_lora(file)
    merged = control_lora.merged(file, Bundle.open(bundle))
    places = names.controlnet(list(expected))
    assert {origins[0].name for origins in places.values()} == set(merged.shapes)
    for name, origins in places.items():
        assert torch.allclose(merged.tensor(origins[0].name).float(), expected[name], atol=4e-3), name


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda stored: {name: tensor for name, tensor in stored.items() if not any(part in name for part in parts)}


def first(stored: Tensors, end: str = ".up") -> str:
    return next(name for name in sorted(stored) if name.endswith(end))


def wider(end: str, axis: int) -> Callable[[Tensors], Tensors]:
    def change(stored: Tensors) -> Tensors:
        name = first(stored, end)
        return {**stored, name: torch.cat([stored[name]] * 2, axis).contiguous()}

    return change


def other_text(stored: Tensors) -> Tensors:
    wide = {name: torch.cat([tensor] * 2, 1) for name, tensor in stored.items() if name.endswith("attn2.to_k.down")}
    assert wide
    return {**stored, **wide}


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "zero convolutions": (without("zero_convs.0."), r"lack zero_convs\.0\.0\.weight \(controlnet's cont"),
    "the hint": (without("input_hint_block.2"), r"lack input_hint_block\.2\.weight"),
    "half of a pair": (lambda s: without(first(s))(s), r"its files lack \S+\.up \(beside \S+\.down\)"),
    "ranks": (wider(".up", 1), "which have other ranks"),
    "no axes": (
        lambda s: {**s, **{name: torch.tensor(1.0) for name in s if name.endswith("to_k.down")}},
        r"and down is \(\), which have other ranks",
    ),
    "rows": (wider(".up", 0), "of another shape: .*, and the weight of the UNet is"),
    "columns": (wider(".down", 1), "of another shape: .*, and the weight of the UNet is|whose text has"),
    "one that no UNet has": (
        lambda s: {**s, "input_blocks.99.0.up": torch.zeros(4, 2), "input_blocks.99.0.down": torch.zeros(2, 4)},
        r"have input_blocks\.99\.0\.down, input_blocks\.99\.0\.up, which the model does not have",
    ),
    "a bias of another length": (lambda s: {**s, "time_embed.2.bias": torch.zeros(3)}, r"embed\.2\.bias is \(3,\)"),
    "a whole weight beside a pair": (
        lambda s: {**s, first(s).replace(".up", ".weight"): torch.zeros(3, 3)},
        "have .*, which the model does not have",
    ),
    "integers": (lambda s: {**s, first(s): s[first(s)].to(torch.int8)}, r"not floating point numbers: \S+\.up \(I8\)"),
    "another family": (other_text, "is a Control-LoRA of a model whose text has .* features, and the text of"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what: str, case: tuple[Path, Path, Tensors, Any], tmp_path: Path) -> None:
    bundle, config, stored, _ = case
    change, says = WRONG[what]
    path = nets.save(change(stored), tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=says):
        add_adapter(path, bundle, "wrong", config=config, report=lambda line: None)
    assert not (bundle / "adapters/wrong").exists()


def test_without_a_configuration_it_is_that_of_a_published_model(
    case: tuple[Path, Path, Tensors, Any], tmp_path: Path
) -> None:
    bundle, _, stored, _ = case
    path = nets.save(stored, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"whose text has \d+ features; published models have 768, 1024 or 2048"):
        add_adapter(path, bundle, "wrong", report=lambda line: None)


def test_the_configuration_is_told_by_the_merged_tensors(
    case: tuple[Path, Path, Tensors, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes of the whole ControlNet decide it, those of the UNet among them."""
    bundle, _, stored, expected = case
    file = SingleFile.open(nets.save(stored, tmp_path / "file.safetensors"))
    merged = control_lora.merged(file, Bundle.open(bundle))
    width = next(tensor.shape[1] for name, tensor in expected.items() if "attn2.to_k.weight" in name)
    name, published = adapter.UNETS[768]
    monkeypatch.setitem(adapter.UNETS, width, (name, {**published, "block_out_channels": [12, 28]}))
    found, config = adapter.configuration(merged, "")
    assert found == name
    attends = any(key.startswith("down_blocks.0.attentions.") for key in expected)
    assert config["down_block_types"][0] == ("CrossAttnDownBlock2D" if attends else "DownBlock2D")
