"""Types where TensorRT does not take them from the graph: 8.6 has no strongly typed networks.

There, FP16 is a flag that lets the builder choose for each layer, so every layer is told its type. An unnamed layer
belongs to the next named one: the parser makes several layers of one node, and the last of them has its output's name.
What must be float32 (sines of timesteps near 999, statistics of norms, the sampler's row) is looked up again in the
finished engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from sdopt.graph import BF16, F16, SHORT, is_float, name_of

FLOATS = {"float32": "FLOAT", "float16": "HALF"}  # of a graph -> of TensorRT
OWN_TYPE = ("CONSTANT", "SHAPE", "CAST", "ASSERTION")  # layers whose type is that of their numbers
PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")  # nearly all of the arithmetic
PRODUCT_NODES = ("Conv", "ConvTranspose", "MatMul", "Gemm")
WORDS = {"HALF": "Half|FP16", "FLOAT": "Float|FP32", "BF16": "BFloat16|BF16"}  # as inspectors write them
HALVES = ("HALF", "BF16")


def types_of(model: ir.Model) -> dict[str, str]:
    """The type of every floating-point tensor that a node of the graph gives."""
    values = [value for node in model.graph for value in node.outputs if is_float(value) and value.dtype is not None]
    return {name_of(value): SHORT[value.dtype] for value in values if value.dtype is not None}


def half_products(model: ir.Model) -> int:
    """How many convolutions and matrix products of the graph are in half."""
    nodes = [node for node in model.graph if node.op_type in PRODUCT_NODES]
    return sum(node.outputs[0].dtype in (F16, BF16) for node in nodes)


def keep_types(network: Any, types: Mapping[str, str]) -> int:
    """Tell each layer of a network that is not strongly typed what it computes in; how many were told."""
    dtype, kept = "", 0
    for i in reversed(range(network.num_layers)):
        layer = network.get_layer(i)
        outputs: list[Any] = [layer.get_output(k) for k in range(layer.num_outputs)]
        dtype = next((FLOATS[types[tensor.name]] for tensor in outputs if tensor.name in types), dtype)
        floats = [k for k, tensor in enumerate(outputs) if tensor.dtype.name in FLOATS.values()]
        shapes = any(tensor.is_shape_tensor for tensor in outputs)
        if layer.type.name in OWN_TYPE or shapes or not floats or not dtype:
            continue
        member = _member(outputs[floats[0]].dtype, dtype)
        if layer.type.name != "NORMALIZATION":  # this one computes in float32 as long as nobody says otherwise
            layer.precision = member
        for k in floats:
            layer.set_output_type(k, member)
        kept += 1
    return kept


def _member(like: Any, name: str) -> Any:
    """The member of that name of an enum that `like` is a member of."""
    return getattr(like.__class__, name)


def layer_types(network: Any) -> dict[str, int]:
    """How many layers give each type, e.g. {"HALF": 240, "FLOAT": 6}: strongly typed, that is what they compute in."""
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
    """How many tensors of each type a finished engine's layers take and give, as its inspector tells in JSON."""
    counts = {name: len(re.findall(rf'"Format/Datatype": "[^"]*\b({word})\b', layers)) for name, word in WORDS.items()}
    return {name: count for name, count in counts.items() if count}


def lost_islands(layers: str, types: Mapping[str, str]) -> tuple[list[str], int]:
    """(tensors that are float32 in the graph and half in the finished engine, how many float32 tensors it shows).

    What is inside of a fused layer is not shown.
    """
    lost, shown = list[str](), 0
    for output in _shown(layers):
        if types.get(output.get("Name", "")) != "float32":
            continue
        shown += 1
        if any(re.search(rf"\b({WORDS[half]})\b", output.get("Format/Datatype", "")) for half in HALVES):
            lost.append(output["Name"])
    return lost, shown


def _shown(layers: str) -> list[dict[str, Any]]:
    """The outputs of all layers of a finished engine; without details, layers are names alone."""
    found: list[Any] = json.loads(layers or "{}").get("Layers", [])
    return [output for entry in found if not isinstance(entry, str) for output in entry.get("Outputs", [])]
