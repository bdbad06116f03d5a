"""Every parameter of a checkpoint is in its graph, under its name and with its numbers, or there is no bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdopt import graph
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export import trace, weights
from sdopt.export.part import Part
from sdopt.graph import names
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT

PAIRS = {"emoji": (EMOJI_CHECKPOINT, EMOJI_BUNDLE), "sd": "tiny", "sdxl": "sdxl"}
NOT_READ = {
    "vae_decoder": ("encoder.", "quant_conv."),
    "vae_encoder": ("decoder.", "post_quant_conv."),
    "sdxl text_encoder": ("text_model.final_layer_norm.",),
}


@pytest.fixture(params=PAIRS)
def exported(request: pytest.FixtureRequest) -> tuple[str, Path, Bundle]:
    """(which, its checkpoint, its bundle)."""
    pair: Any = PAIRS[request.param]
    if isinstance(pair, str):
        pair = tuple(request.getfixturevalue(f"{pair}_{thing}") for thing in ("checkpoint", "bundle"))
    return request.param, pair[0], Bundle.open(pair[1])


def file_of(checkpoint: Path, component: str) -> dict[str, Any]:
    """The tensors of a component's file, by the names in it; CLIP's as in every published file."""
    from safetensors.numpy import load_file

    component = "unet" if component.startswith("unet") else component  # its variants have the same weights
    path = next((checkpoint / component.removesuffix("_decoder").removesuffix("_encoder")).glob("*.safetensors"), None)
    tensors = load_file(path or next((checkpoint / component).glob("*.safetensors")))
    if not component.startswith("text_encoder"):
        return tensors
    known = ("text_model.", "text_projection.")  # transformers 5.6 writes a new model without the first one
    return {name if name.startswith(known) else f"text_model.{name}": tensors[name] for name in tensors}


def test_every_parameter_is_there_by_the_name_and_with_the_numbers_of_the_checkpoints_file(
    exported: tuple[str, Path, Bundle],
) -> None:
    which, checkpoint, bundle = exported
    for component in bundle.components:
        for library in ("", "ort"):
            model = graph.load(bundle.component(component, library).graph)
            there, wanted = names.parameters(model), file_of(checkpoint, component)
            absent = (*NOT_READ.get(component, ()), *NOT_READ.get(f"{which} {component}", ()))
            assert there.keys() == {name for name in wanted if not name.startswith(absent)}
            for name, parts in there.items():
                np.testing.assert_array_equal(names.parameter(parts), wanted[name], name)
            assert not [weight.name for parts in there.values() for weight, _ in parts if weight.copy]
            others = [n for n in model.graph.initializers if names.parse(n) is None]
            assert all(name.startswith(names.CONSTANTS) for name in others)


def test_linears_are_transposed_and_a_gate_stands_apart_from_its_value() -> None:
    there = names.parameters(graph.load(EMOJI_BUNDLE / "unet.onnx"))
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert [w.name for w, _ in there[f"{block}.attn1.to_q.weight"]] == [f"{block}.attn1.to_q.weight@T"]
    parts = sorted(w.name for w, _ in there[f"{block}.ff.net.0.proj.weight"])
    assert parts == [f"{block}.ff.net.0.proj.weight@T[{rows}]" for rows in ("0:640", "640:1280")]


class Norms(torch.nn.Module):
    """Two norms with equal weights, a linear layer, and what may be left over."""

    def __init__(self, left_over: bool = False) -> None:
        super().__init__()
        self.first, self.second = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        self.linear, self.same = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.same.load_state_dict(self.linear.state_dict())
        self.register_buffer("scale", torch.ones(8))
        if left_over:
            self.spare = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.same(self.linear(self.first(x * self.scale))))


def part_of(module: torch.nn.Module, **changes: Any) -> Part:
    spec = TensorSpec("x", "float32", ("batch", 3, 8))
    sizes = ({"batch": 2},)
    module = module.eval().requires_grad_(False)
    return Part("toy", module, (spec,), (replace(spec, name="y"),), sizes, {}, **changes)


def test_equal_parameters_have_an_initializer_each(tmp_path: Path) -> None:
    part = part_of(Norms())
    model = trace.trace(part)
    assert {w.name for parts in names.parameters(model).values() for w, _ in parts} == {
        "first.weight", "first.bias", "second.weight", "second.bias",
        "linear.weight@T", "linear.bias", "same.weight@T", "same.bias",
    }  # fmt: skip
    assert all(len(value.uses()) == 1 for value in graph.weights(model) if names.parse(value.name or ""))
    trace.save(model, tmp_path / "toy.onnx")
    assert weights.prove(part, tmp_path / "toy.onnx") == 8


def test_a_parameter_that_is_not_used_stops_the_export_unless_it_is_known() -> None:
    with pytest.raises(CheckpointError, match=r"toy: its graph does not use spare\.weight, spare\.bias; either"):
        trace.trace(part_of(Norms(left_over=True)))
    trace.trace(part_of(Norms(left_over=True), unused={"spare.": "a spare"}))


def test_other_numbers_and_unknown_names_are_refused(tmp_path: Path) -> None:
    part, path = part_of(Norms()), tmp_path / "toy.onnx"
    trace.save(trace.trace(part), path)
    with torch.no_grad():
        part.module.get_parameter("same.weight")[3, 5] += 1e-6
    with pytest.raises(CheckpointError, match=r"toy\.onnx: same\.weight is not what the checkpoint holds"):
        weights.prove(part, path)
    model = ir.load(path)
    model.graph.initializers["same.bias"].name = "other.bias"
    ir.save(model, tmp_path / "lost.onnx")
    with pytest.raises(CheckpointError, match=r"does not use same\.bias;"):
        weights.prove(part, tmp_path / "lost.onnx")
    with pytest.raises(CheckpointError, match=r"other\.bias is no parameter of the toy"):
        weights.prove(replace(part, unused={"same.bias": "not asked for"}), tmp_path / "lost.onnx")
