"""An Einsum that only moves axes is a Transpose; one that computes stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.graph.permutations import transpose_permutations
from tests.graph.common import FLOAT, run


def einsum(equation: str, rank: int) -> ir.Model:
    """x by this equation, and then its opposite, of a tensor whose axes are 2, 3, 4, ... long."""
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape([2 + axis for axis in range(rank)]))
    moved = ir.node("Einsum", [x], {"equation": equation}, name="moved")
    y = ir.Value(name="y", type=FLOAT)
    negative = ir.node("Neg", moved.outputs, outputs=[y], name="negative")
    moved.outputs[0].name, moved.outputs[0].type = "moved_0", FLOAT
    graph = ir.Graph([x], [y], nodes=[moved, negative], name="g", opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("equation", "rank"), [("ab->ba", 2), ("nhwpqc->nchpwq", 6)])
def test_axes_that_move_are_transposed(equation: str, rank: int, tmp_path: Path) -> None:
    model = einsum(equation, rank)
    x = np.random.default_rng(0).standard_normal([2 + axis for axis in range(rank)]).astype(np.float32)
    expected = run(model, tmp_path, x)
    assert transpose_permutations(model) == 1
    assert [node.op_type for node in model.graph] == ["Transpose", "Neg"]
    np.testing.assert_array_equal(run(model, tmp_path, x), expected)


@pytest.mark.parametrize("equation", ["ab->a", "aa->a", "ab"])
def test_what_computes_stays(equation: str) -> None:
    model = einsum(equation, 2)
    assert transpose_permutations(model) == 0
    assert [node.op_type for node in model.graph] == ["Einsum", "Neg"]
