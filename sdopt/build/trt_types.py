"""Types for TensorRT 8.6, which has no strongly typed networks: it does not take types from the graph.

In 8.6 the flag FP16 lets the builder choose a type for each layer, so here every layer is told its type. The parser
makes several layers of one node, and only the last of them has the name of the node's output. So an unnamed layer has
the type of the next named one. What must be float32 (sines of timesteps near 999, statistics of norms, the sampler's
row) is checked in the finished engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from sdopt.graph import BF16, F16, SHORT, is_float, name_of

FLOATS = {"float32": "FLOAT", "float16": "HALF"}  # type in the graph -> in TensorRT
OWN_TYPE = ("CONSTANT", "SHAPE", "CAST", "ASSERTION")  # layers that keep their own type
PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")  # nearly all of the arithmetic
PRODUCT_NODES = ("Conv", "ConvTranspose", "MatMul", "Gemm")
WORDS = {"HALF": "Half|FP16", "FLOAT": "Float|FP32", "BF16": "BFloat16|BF16"}  # as inspectors write them
HALVES = ("HALF", "BF16")


def types_of(model: ir.Model) -> dict[str, str]:
    """The type of every floating-point tensor that a node of the graph computes."""
    types: dict[str, str] = {}
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is not None and is_float(value):
                types[name_of(value)] = SHORT[value.dtype]
    return types


def half_products(model: ir.Model) -> int:
    """How many convolutions and matrix products of the graph are in half."""
    return len([node for node in model.graph if node.op_type in PRODUCT_NODES and node.outputs[0].dtype in (F16, BF16)])


def keep_types(network: Any, types: Mapping[str, str]) -> int:
    """Tell each layer of a network that is not strongly typed its type. Returns how many layers were told."""
    dtype, told = "", 0
    for i in reversed(range(network.num_layers)):  # backwards: unnamed layers come before their named one
        layer = network.get_layer(i)
        outputs: list[Any] = [layer.get_output(k) for k in range(layer.num_outputs)]
        dtype = next((FLOATS[types[tensor.name]] for tensor in outputs if tensor.name in types), dtype)
        float_indices = [k for k, tensor in enumerate(outputs) if tensor.dtype.name in FLOATS.values()]
        gives_shape = any(tensor.is_shape_tensor for tensor in outputs)
        if layer.type.name in OWN_TYPE or gives_shape or not float_indices or not dtype:
            continue
        member = _same_enum(outputs[float_indices[0]].dtype, dtype)
        if layer.type.name != "NORMALIZATION":  # computes in float32 unless it is told otherwise
            layer.precision = member
        for k in float_indices:
            layer.set_output_type(k, member)
        told += 1
    return told


def _same_enum(member: Any, name: str) -> Any:
    """The member `name` of the enum that `member` belongs to."""
    return getattr(member.__class__, name)


def layer_types(network: Any) -> dict[str, int]:
    """How many layers have outputs of each type, e.g. {"HALF": 240, "FLOAT": 6}."""
    return _counted(layer for layer in _layers(network) if layer.num_outputs)


def product_types(network: Any) -> dict[str, int]:
    """The same for convolutions and matrix products alone."""
    return _counted(layer for layer in _layers(network) if layer.type.name in PRODUCTS)


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


def _counted(layers: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in layers:
        name = layer.get_output(0).dtype.name
        counts[name] = counts.get(name, 0) + 1
    return counts


def inspected(layers: str) -> dict[str, int]:
    """How many inputs and outputs of a finished engine's layers have each type. `layers` is its inspector's JSON."""
    counts = {name: len(re.findall(rf'"Format/Datatype": "[^"]*\b({word})\b', layers)) for name, word in WORDS.items()}
    return {name: count for name, count in counts.items() if count}


def lost_islands(layers: str, types: Mapping[str, str]) -> tuple[list[str], int]:
    """(tensors that are float32 in the graph and half in the finished engine, how many float32 tensors it shows).

    The inspector does not show tensors inside of a fused layer.
    """
    lost, shown = list[str](), 0
    for output in _shown_outputs(layers):
        if types.get(output.get("Name", "")) != "float32":
            continue
        shown += 1
        if any(re.search(rf"\b({WORDS[half]})\b", output.get("Format/Datatype", "")) for half in HALVES):
            lost.append(output["Name"])
    return lost, shown


def _shown_outputs(layers: str) -> list[dict[str, Any]]:
    """The outputs of all layers in an inspector's JSON. A layer without details is only a name there."""
    entries: list[Any] = json.loads(layers or "{}").get("Layers", [])
    outputs: list[dict[str, Any]] = []
    for entry in entries:
        if not isinstance(entry, str):
            outputs += entry.get("Outputs", [])
    return outputs
