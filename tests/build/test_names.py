"""Weights keep their names through every pass of a build, and with the name their numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.build.fixed import fix_lengths
from sdopt.build.fuse_step import fuse_step
from sdopt.build.half import half
from sdopt.build.halves import join_halves
from sdopt.build.lower import RULES, lower, lower_operators
from sdopt.build.simulate import simulate_half
from sdopt.graph import names
from sdopt.graph.ort_ops import ort_ops
from tests.build.common import SIZES, checked, inputs_of, outputs
from tests.conftest import EMOJI_BUNDLE

Pass = Callable[[ir.Model], Any]


def fused(model: ir.Model) -> None:
    fuse_step(model, guided=True, rescale=True)
    join_halves(model, 2)


def static(model: ir.Model) -> None:
    fix_lengths(model, SIZES)


def fp16(model: ir.Model) -> None:
    half(model)


def bf16(model: ir.Model) -> None:
    half(model, dtype="bfloat16")


def islands(model: ir.Model) -> None:
    half(model, islands=["MatMul", "LayerNormalization"])


def operators(model: ir.Model) -> None:
    lower_operators(model, RULES)


UNET = {
    "ort": [ort_ops],
    "fp16": [fp16],
    "bf16": [bf16],
    "bf16 of fp16": [fp16, bf16],
    "islands": [islands],
    "fp16 twice": [islands, islands],
    "lowered": [lower],
    "fused": [fused],
    "static": [static],
    "a strongly typed step": [fused, fp16, operators, static],
    "a bfloat16 step": [fused, bf16, operators, static],
    "an old TensorRT's step": [fused, fp16, lower, static],
    "ONNX Runtime's step on a GPU": [fused, fp16, ort_ops],
    "simulate_half": [fp16, lower, simulate_half],
}


@pytest.fixture(params=["emoji", "sdxl"])
def unet(request: pytest.FixtureRequest) -> Path:
    return EMOJI_BUNDLE / "unet.onnx" if request.param == "emoji" else request.getfixturevalue("sdxl_unet")


def names_are_kept(source: Path, passes: list[Pass], folder: Path) -> ir.Model:
    before, model = graph.load(source), graph.load(source)
    for each in passes:
        each(model)
    graph.save(model, folder / "passed.onnx")
    model = graph.load(folder / "passed.onnx")
    there, wanted = names.parameters(model), names.parameters(before)
    assert there.keys() == wanted.keys()
    for name, parts in there.items():
        assert {w.name for w, _ in parts if not w.copy} == {w.name for w, _ in wanted[name]}
        stored, exact = names.parameter(parts), names.parameter(wanted[name])
        direct, by_float16 = (e.astype(stored.dtype) for e in (exact, exact.astype(np.float16)))
        assert np.array_equal(stored, direct) or np.array_equal(stored, by_float16), name
    assert all(names.parse(n) or n.startswith(names.CONSTANTS) for n in model.graph.initializers)
    return model


@pytest.mark.parametrize("passes", UNET.values(), ids=UNET)
def test_a_unets_weights_keep_their_names(unet: Path, passes: list[Pass], tmp_path: Path) -> None:
    names_are_kept(unet, passes, tmp_path)


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("passes", [[ort_ops], [fp16, operators, static], [bf16, static], [fp16, lower]])
def test_those_of_the_other_components_too(component: str, passes: list[Pass], tmp_path: Path) -> None:
    names_are_kept(EMOJI_BUNDLE / f"{component}.onnx", passes, tmp_path)


def test_a_weight_that_two_types_read_is_there_twice_and_the_float32_one_says_so(tmp_path: Path) -> None:
    x, y, z = (ir.Value(name=n, type=ir.TensorType(graph.F32), shape=ir.Shape([4, 4])) for n in "xyz")
    weight = ir.Value(name="fc.weight@T", type=ir.TensorType(graph.F32), shape=ir.Shape([4, 4]))
    weight.const_value = ir.tensor(np.eye(4, dtype=np.float32) / 3, name=weight.name)
    nodes = [
        ir.node("MatMul", [x, weight], outputs=[y], name="first"),
        ir.node("Mul", [y, weight], outputs=[z], name="second"),
    ]
    made = ir.Graph([x], [z], nodes=nodes, initializers=[weight], opset_imports={"": 23}, name="g")
    model = ir.Model(made, ir_version=10)
    for _ in range(2):  # the second time, it is already so
        half(model, islands=["first"])
        types = {value.name: value.dtype for value in graph.weights(model)}
        assert types == {"fc.weight@T": graph.F16, "fc.weight@T@float32": graph.F32}
        assert [w.copy for w, _ in names.parameters(model)["fc.weight"]].count("") == 1
        checked(model, tmp_path)
    half(model, dtype="bfloat16")
    assert {value.name: value.dtype for value in graph.weights(model)} == {"fc.weight@T": graph.BF16}


def test_ort_ops_of_a_named_graph_reads_the_same_weights_file(tmp_path: Path) -> None:
    own, theirs = (graph.load(EMOJI_BUNDLE / f"unet{kind}.onnx") for kind in ("", ".ort"))
    for name, parts in names.parameters(own).items():
        for (weight, value), (_, other) in zip(parts, names.parameters(theirs)[name], strict=True):
            one, two = value.const_value, other.const_value
            if isinstance(one, ir.ExternalTensor):
                assert isinstance(two, ir.ExternalTensor)
                assert (one.location, one.offset) == (two.location, two.offset), weight.name
    arrays = inputs_of(EMOJI_BUNDLE / "unet.onnx")
    fresh = graph.load(EMOJI_BUNDLE / "unet.onnx")
    ort_ops(fresh)
    actual, wanted = outputs(fresh, arrays, tmp_path), outputs(theirs, arrays, tmp_path)
    np.testing.assert_array_equal(actual["noise_pred"], wanted["noise_pred"])
