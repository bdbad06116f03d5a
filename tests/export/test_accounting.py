"""Every weight comes from the file, every tensor of the file is used, and all of them are finite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdopt.errors import CheckpointError
from sdopt.export import export
from sdopt.export.source import open_checkpoint
from tests import tiny
from tests.conftest import EMOJI_CHECKPOINT

COMPONENTS = ("text_encoder", "unet", "vae")


def edited(folder: Path, component: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The embedded model with other tensors in the file of one component."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(EMOJI_CHECKPOINT, folder)
    path = next((folder / component).glob("*.safetensors"))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def refusal(folder: Path, component: str) -> str:
    with open_checkpoint(str(folder), offline=True) as checkpoint, pytest.raises(CheckpointError) as error:
        checkpoint.load(component)
    return str(error.value)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_weight_of_another_name_is_named_and_so_is_the_one_that_is_missing(component: str, tmp_path: Path) -> None:
    names: list[str] = []

    def rename(tensors: dict[str, Any]) -> None:
        names.append(next(name for name in sorted(tensors) if name.endswith("weight")))
        tensors["base_layer." + names[0]] = tensors.pop(names[0])

    folder = edited(tmp_path / "c", component, rename)
    message = refusal(folder, component)
    assert f"lack {names[0].removeprefix('text_model.')}" in message
    assert f"have base_layer.{names[0]}" in message


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(component: str, value: float, tmp_path: Path) -> None:
    names: list[str] = []

    def damage(tensors: dict[str, Any]) -> None:
        names.append(next(name for name in sorted(tensors) if name.endswith("bias")))
        tensors[names[0]].view(-1)[-1] = value

    message = refusal(edited(tmp_path / "c", component, damage), component)
    assert f"{names[0].removeprefix('text_model.')} has NaN or infinite values" in message


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_weight_of_another_shape_is_told_without_a_librarys_advice(component: str, tmp_path: Path) -> None:
    def larger(tensors: dict[str, Any]) -> None:
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
        tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])

    message = refusal(edited(tmp_path / "checkpoint", component, larger), component)
    assert component in message
    assert "ignore_mismatched_sizes" not in message
    assert "shape" in message


def test_tensors_that_published_files_have_beside_the_model_are_no_fault(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]
        tensors["vision_model.post_layernorm.bias"] = torch.zeros(4)
        tensors["logit_scale"] = torch.zeros(1)

    with open_checkpoint(str(edited(tmp_path / "c", "text_encoder", add)), offline=True) as checkpoint:
        checkpoint.load("text_encoder")


def test_the_last_model_is_checked_before_the_first_is_traced(tmp_path: Path) -> None:
    folder, lines = edited(tmp_path / "c", "vae", lambda tensors: tensors.clear()), []
    with pytest.raises(CheckpointError, match="vae"):
        export(folder, tmp_path / "bundle", report=lines.append)
    assert not lines
    assert not (tmp_path / "bundle").exists()


def test_a_component_without_the_variant_is_read_without_it(tmp_path: Path) -> None:
    folder = tiny.sd(tmp_path / "sd")
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with open_checkpoint(str(folder), variant="fp16", offline=True) as checkpoint:
        assert [checkpoint.load(name) for name in COMPONENTS]


def test_what_a_text_encoder_may_have_beside_it_is_a_fault_elsewhere(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["logit_scale"] = torch.zeros(1)

    assert "have logit_scale" in refusal(edited(tmp_path / "c", "unet", add), "unet")
