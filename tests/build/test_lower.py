"""A lowered graph is the same graph to anyone who runs it, and holds nothing that opset 17 does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.build.fuse_step import fuse_step
from sdopt.build.half import half
from sdopt.build.lower import lower
from sdopt.bundle.specs import Array
from sdopt.errors import UsageError
from sdopt.metrics import psnr
from tests.build.common import half_outputs, outputs, parity
from tests.build.test_half import COMPONENTS, UNET, inputs_of_step, small_graph, value
from tests.conftest import EMOJI_BUNDLE

EXACT_DB = 120.0


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_is_exact_in_opset_17(component: str, tmp_path: Path) -> None:
    source = EMOJI_BUNDLE / f"{component}.onnx"
    assert parity(source, lower, tmp_path) >= EXACT_DB
    model = lower(graph.load(source))
    assert dict(model.graph.opset_imports) == {"": 17}
    assert model.ir_version == 8
    left = {node.op_type for node in model.graph}
    assert not left & {"Attention", "GroupNormalization", "InstanceNormalization", "Gelu", "RMSNormalization"}


def test_the_unet_of_sdxl_is_exact_in_opset_17(sdxl_unet: Path, tmp_path: Path) -> None:
    assert parity(sdxl_unet, lower, tmp_path) >= EXACT_DB


def test_the_passes_compose_in_their_order(tmp_path: Path) -> None:
    exact, model = fuse_step(graph.load(UNET), rescale=True), fuse_step(graph.load(UNET), rescale=True)
    half(model)
    lower(model)
    arrays = inputs_of_step(exact)
    wanted, actual = outputs(exact, arrays, tmp_path), half_outputs(model, arrays, tmp_path)
    assert min(psnr(wanted[name], actual[name]) for name in wanted) >= 60


def test_norms_of_a_half_graph_compute_in_float32() -> None:
    model = graph.load(UNET)
    half(model)
    lower(model)
    inside = [n for n in model.graph if n.op_type in ("ReduceMean", "Sqrt", "Div") and "group_norm" in n.name]
    assert len(inside) == 4 * 30
    assert {node.outputs[0].dtype for node in inside} == {graph.F32}


def alone(op: str, arrays: list[Array], shape: tuple[int, ...], attributes: dict[str, Any]) -> ir.Model:
    """A graph of one operator: its first input is x, the others are constants."""
    x, y = value("x", *arrays[0].shape), value("y", *shape)
    constants = [ir.Value(name=f"c{i}", const_value=ir.Tensor(a, name=f"c{i}")) for i, a in enumerate(arrays[1:])]
    for constant, array in zip(constants, arrays[1:], strict=True):
        constant.type = ir.TensorType(graph.I64 if array.dtype == np.int64 else graph.F32)
        constant.shape = ir.Shape(array.shape)
    return small_graph(ir.node(op, [x, *constants], attributes, outputs=[y], name="n"), x=x, y=y, constants=constants)


@pytest.mark.parametrize(
    ("op", "shapes", "attributes"),
    [
        ("InstanceNormalization", [(2, 3, 4, 5), (3,), (3,)], {"epsilon": 1e-3}),
        ("InstanceNormalization", [(2, 3, 9), (3,), (3,)], {}),
        ("GroupNormalization", [(2, 6, 4, 5), (6,), (6,)], {"num_groups": 3}),
        ("GroupNormalization", [(2, 6, 9), (6,), (6,)], {"num_groups": 2}),
        ("RMSNormalization", [(2, 3, 8), (8,)], {"axis": -1}),
        ("RMSNormalization", [(2, 3, 8), (3, 8)], {"axis": 1, "epsilon": 1e-2}),
        ("Gelu", [(2, 40)], {"approximate": "none"}),
        ("Gelu", [(2, 40)], {"approximate": "tanh"}),
        ("Attention", [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)], {}),
        ("Attention", [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (2, 1, 5, 7)], {"scale": 0.3}),
    ],
    ids=lambda v: str(v),
)
def test_every_rule_is_exact(op: str, shapes: list[tuple[int, ...]], attributes: dict, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    models = [alone(op, arrays, shapes[0], attributes) for _ in range(2)]
    wanted, actual = (outputs(m, {"x": arrays[0]}, tmp_path)["y"] for m in (models[0], lower(models[1])))
    assert psnr(wanted, actual) >= EXACT_DB


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceL2"])
def test_axes_become_an_attribute(op: str, tmp_path: Path) -> None:
    arrays = [np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32), np.array([1, 2])]
    models = [alone(op, arrays, (2, 1, 1), {"keepdims": 1}) for _ in range(2)]
    wanted, actual = (outputs(m, {"x": arrays[0]}, tmp_path)["y"] for m in (models[0], lower(models[1])))
    np.testing.assert_allclose(wanted, actual, rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"),
    [
        ("Attention", [(1, 2, 4, 8)] * 3, {"is_causal": 1}, "is_causal cannot be lowered"),
        ("Attention", [(1, 4, 8)] * 3, {"q_num_heads": 2, "kv_num_heads": 2}, "q_num_heads, kv_num_heads"),
        ("Mish", [(2, 3)], {}, "operator ai.onnx Mish"),
        ("Resize", [(1, 1, 2, 2)], {"antialias": 1}, "Resize with antialias"),
    ],
)
def test_what_opset_17_cannot_say_is_named(op: str, inputs: list, attributes: dict, message: str) -> None:
    values = [value(f"x{i}", *shape) for i, shape in enumerate(inputs)]
    y = value("y", *inputs[0])
    model = small_graph(ir.node(op, values, attributes, outputs=[y], name="n"), x=values[0], y=y, constants=[])
    with pytest.raises(UsageError, match=message):
        lower(model)
