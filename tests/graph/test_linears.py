"""A linear layer in parts is the same function, and what only looks like one is left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.graph import Writer, load, rank, weights
from sdopt.graph.linears import split_linears
from tests.conftest import EMOJI_BUNDLE
from tests.graph.common import FLOAT, run


def linear(weight: Any, axis: int = -1, outputs: int = 2, biased: bool = True) -> ir.Model:
    """The parts of x weight + bias, last to first."""
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(["batch", 4, 6]))
    model = ir.Model(ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 23}), ir_version=10)
    write = Writer(model, "")
    columns = write.constant("weight", weight, ir.DataType.FLOAT)
    offset = write.constant("bias", np.arange(weight.shape[1]), ir.DataType.FLOAT)
    product = write("MatMul", [x, columns], "product", shape=("batch", 4, weight.shape[1]))
    added = write("Add", [product, offset if biased else product], "added")
    parts = [ir.Value(name=f"part{i}", type=FLOAT, shape=ir.Shape(["batch", None, None])) for i in range(outputs)]
    model.graph.append(ir.node("Split", [added], {"axis": axis, "num_outputs": outputs}, outputs=parts, name="split"))
    model.graph.outputs.append(write("Concat", parts[::-1], "y", axis=axis))
    return model


@pytest.mark.parametrize("outputs", [2, 3])
def test_a_linear_layer_whose_result_is_split_becomes_one_for_each_part(tmp_path: Path, outputs: int) -> None:
    rng = np.random.default_rng(2)
    model = linear(rng.standard_normal((6, 12)), outputs=outputs)
    x = rng.standard_normal((2, 4, 6), np.float32)
    expected = run(model, tmp_path, x)
    assert split_linears(model) == 1
    assert Counter(node.op_type for node in model.graph) == {"MatMul": outputs, "Add": outputs, "Concat": 1}
    assert [tuple(v.shape or ()) for v in weights(model) if rank(v) == 2] == [(6, 12 // outputs)] * outputs
    np.testing.assert_allclose(run(model, tmp_path, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("odd", [{"axis": 1}, {"biased": False}])
def test_a_split_of_something_else_stays(odd: dict[str, Any]) -> None:
    model = linear(np.ones((6, 12)), **odd)
    before = [node.op_type for node in model.graph]
    assert split_linears(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_the_exported_unet_has_none_left() -> None:
    unet = load(EMOJI_BUNDLE / "unet.onnx")
    assert split_linears(unet) == 0
    assert sum("/product_" in (node.name or "") for node in unet.graph) == 2 * 7  # two for each transformer block
