"""A half graph as float32 arithmetic that rounds like half: it computes what a half engine does, on any machine.

ONNX Runtime's CPU provider runs a float16 graph with casts around each node, and drops pairs of casts that cancel.
Then little is rounded and nothing overflows, so a parity that is measured that way is too good. Here the graph itself
casts every half value to half and back to float32. The provider keeps these casts if its optimizations are off.

Inside a node the arithmetic is float32, as on tensor cores, which multiply half numbers and add in float32. After
`lower`, attention scores are values of the graph, so they are rounded too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import onnxruntime

from sdopt.bundle.specs import Array
from sdopt.graph import BF16, F16, F32, Writer, behind, converted, drop_unused, name_of, weights

HALF = (F16, BF16)
ort = cast(Any, onnxruntime)  # its bindings are not typed


def simulate_half(model: ir.Model) -> ir.Model:
    """Change `model` in place to float32 nodes, with a rounding after each that was half. Returns it."""
    graph = model.graph
    nodes = list(graph)
    for value in weights(model):
        if value.dtype in HALF and value.const_value is not None:
            value.const_value = converted(value.const_value, F32, name_of(value))
            value.dtype = F32
    half_values = [value for value in graph.inputs if value.dtype in HALF]
    for node in nodes:
        for value in node.outputs:
            if value.dtype in HALF:
                half_values.append(value if node.op_type == "Cast" else _rounded(model, node, value))
    for value in half_values:
        users = [(user, index) for user, index in value.uses() if user.op_type not in ("Cast", "Shape")]
        if users:
            wide = behind(model, value)("Cast", [value], f"{name_of(value)}/wide", dtype=F32, to=int(F32.value))
            for user, index in users:
                user.replace_input_with(index, wide)
    drop_unused(model)
    return model


def _rounded(model: ir.Model, node: ir.Node, value: ir.Value) -> ir.Value:
    """A half value with the name of `value`; what the node computes is float32 and gets another name."""
    name, dtype = name_of(value), value.dtype
    assert dtype is not None
    value.name, value.dtype = f"{name}/exact", F32
    narrow = Writer(model, "", after=node)(
        "Cast", [value], f"{name}/narrow", dtype=dtype, output=name, to=int(dtype.value)
    )
    for user, index in tuple(value.uses()):
        if user is not narrow.producer():
            user.replace_input_with(index, narrow)
    outputs = model.graph.outputs
    for index, output in enumerate(outputs):
        if output is value:
            outputs[index] = narrow
    return narrow


def session(path: Path, *, optimize: bool = False, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU. Unless `optimize`, it runs the graph as it is."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs_of(given: Any, arrays: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
    """The outputs of a session by name: those of `names`, or all."""
    wanted = [output.name for output in given.get_outputs()] if names is None else list(names)
    return dict(zip(wanted, given.run(wanted, dict(arrays)), strict=True))
