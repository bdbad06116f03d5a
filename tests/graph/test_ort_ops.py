"""A graph in ONNX Runtime's own operators is the same function, on the same weights."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.bundle.files import Bundle
from sdopt.engine.ort import OrtEngine
from sdopt.graph.ort_ops import ort_ops, write_ort_graph
from sdopt.metrics import psnr
from tests.conftest import EMOJI_BUNDLE
from tests.graph.common import FLOAT, run

SIZES = {"images": 1, "batch": 2, "tokens": 7, "height": 32, "width": 48, "latent_height": 12, "latent_width": 20}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in graph.load(path).graph)


@pytest.fixture(params=["unet", "vae_decoder", "vae_encoder"])
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A component's own graph and weights, alone in a folder."""
    for name in (f"{request.param}.onnx", f"{request.param}.onnx.data"):
        shutil.copy(EMOJI_BUNDLE / name, tmp_path)
    return tmp_path / f"{request.param}.onnx"


def test_it_answers_the_same_and_reads_the_same_weights(copied: Path) -> None:
    component = Bundle.open(EMOJI_BUNDLE, verify=False).component(copied.stem)
    before = {path.name: path.stat().st_size for path in copied.parent.iterdir()}
    own = write_ort_graph(copied)
    assert own == copied.with_name(f"{copied.stem}.ort.onnx")
    assert {path.name: path.stat().st_size for path in copied.parent.iterdir()} == {
        **before,
        own.name: own.stat().st_size,
    }
    assert own.stat().st_size < 400_000
    rng = np.random.default_rng(0)
    arrays = {s.name: rng.standard_normal(s.sized(SIZES), np.float32) for s in component.inputs}
    answers: list[Any] = []
    for path in (copied, own):
        with OrtEngine(replace(component, graph=path), 1, "cpu") as engine:
            answers.append(engine(**arrays))
    for name, expected in answers[0].items():
        assert psnr(expected, answers[1][name]) > 110


def test_norms_and_attention_are_kept_whole(copied: Path) -> None:
    own = write_ort_graph(copied)
    assert own is not None
    before, after = operators(copied), operators(own)
    assert after["InstanceNormalization"] == before["GroupNormalization"] > 10
    assert after["GroupNormalization"] == 0
    assert after["BatchNormalization"] == before["GroupNormalization"]
    assert after["Shape"] < before["Shape"] + before["GroupNormalization"]  # equal shapes are measured once
    assert after["MultiHeadAttention"] + after["Attention"] == before["Attention"]
    assert after["MultiHeadAttention"] >= before["Attention"] - 1  # the first one reads what both halves share
    assert after["Transpose"] < before["Transpose"]


def test_a_graph_with_nothing_to_gain_has_no_second_one() -> None:
    assert write_ort_graph(EMOJI_BUNDLE / "text_encoder.onnx") is None  # its attention has a mask
    assert not list(EMOJI_BUNDLE.glob("text_encoder.ort*"))


def attention(perm: tuple[int, ...] = (0, 2, 1, 3), **attributes: Any) -> ir.Model:
    """-softmax(x x^T / sqrt(4)) x of two heads, as PyTorch's exporter writes it, but for `perm` and `attributes`."""
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(["batch", "tokens", 8]))
    model = ir.Model(ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 23}), ir_version=10)
    write = graph.Writer(model, "")
    split, flat = (write.constant(*given, ir.DataType.INT64) for given in (("by", [0, 0, 2, 4]), ("flat", [0, 0, 8])))
    apart = write("Reshape", [x, split], "split", shape=("b", "t", 2, 4))
    heads = write("Transpose", [apart], "heads", perm=perm, shape=("b", 2, "t", 4))
    mixed = write("Attention", [heads] * 3, "mixed", **attributes)
    merged = write("Transpose", [mixed], "merged", perm=(0, 2, 1, 3), shape=("b", "t", 2, 4))
    together = write("Reshape", [merged, flat], "together", shape=("batch", "tokens", 8))
    model.graph.outputs.append(write("Neg", [together], "y"))
    return model


@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention_of_any_scale(tmp_path: Path, scale: float | None) -> None:
    attributes = {} if scale is None else {"scale": scale}
    x = np.random.default_rng(1).standard_normal((2, 5, 8), np.float32)
    model = attention(**attributes)
    expected = run(model, tmp_path, x)
    assert ort_ops(model) == 1
    assert [node.op_type for node in model.graph] == ["MultiHeadAttention", "Neg"]
    np.testing.assert_allclose(run(model, tmp_path, x), expected, atol=1e-6)


@pytest.mark.parametrize("odd", [{"is_causal": 1}, {"softcap": 5.0}, {"perm": (0, 1, 2, 3)}])
def test_what_has_another_form_is_left_alone(odd: dict[str, Any]) -> None:
    model = attention(**odd)
    before = [node.op_type for node in model.graph]
    assert ort_ops(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_an_output_of_the_graph_keeps_its_maker() -> None:
    model = attention()
    model.graph.outputs[0] = next(node for node in model.graph if node.op_type == "Neg").inputs[0]
    assert ort_ops(model) == 0


def test_a_group_norm_of_an_older_opset_means_something_else() -> None:
    model = attention()
    model.graph.opset_imports[""] = 18
    x = model.graph.inputs[0]
    graph.Writer(model, "")("GroupNormalization", [x, x, x], "norm", num_groups=2)
    assert ort_ops(model) == 1  # the attention alone


def test_shapes_without_names_are_not_taken_for_equal(tmp_path: Path) -> None:
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape([None, 4, None]))
    model = ir.Model(ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 23}), ir_version=10)
    write = graph.Writer(model, "")
    one, zero = (write.constant(name, [value] * 4, ir.DataType.FLOAT) for name, value in (("one", 1), ("zero", 0)))
    first = write("GroupNormalization", [x, one, zero], "first", num_groups=2)
    half = write("MaxPool", [first], "half", kernel_shape=[2], strides=[2])
    second = write("GroupNormalization", [half, one, zero], "second", num_groups=2)
    model.graph.outputs.append(write("Neg", [second], "y"))
    numbers = np.random.default_rng(3).standard_normal((1, 4, 8), np.float32)
    expected = run(model, tmp_path, numbers)
    assert ort_ops(model) == 2
    np.testing.assert_allclose(run(model, tmp_path, numbers), expected, atol=1e-5)


def test_the_engine_takes_the_graph_that_is_meant_for_it() -> None:
    bundle = Bundle.open(EMOJI_BUNDLE, verify=False)
    assert bundle.component("unet", "ort").graph.name == "unet.ort.onnx"
    assert bundle.component("unet", "openvino").graph.name == bundle.component("unet").graph.name == "unet.onnx"
    assert bundle.component("text_encoder", "ort").graph.name == "text_encoder.onnx"
    assert min(entry.psnr_db for entry in bundle.component("unet", "ort").parity) > 100
