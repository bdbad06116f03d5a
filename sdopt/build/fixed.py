"""Lengths that never change, written into the graph: a builder then knows shapes that it would have to compute.

    sample [batch, 4, latent_height, latent_width]   with batch=1, latent_height=64, latent_width=64
    sample [1, 4, 64, 64];   Shape -> Gather -> Mul -> Concat -> Reshape   becomes   Reshape with constant numbers

One walk over the nodes: a node gets the shapes that ONNX infers from its inputs, and whole numbers that follow from
them are computed (by ONNX's reference implementation) and become constants.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sdopt.bundle.specs import Array
from sdopt.graph import BOOL, I64, attribute, drop_unused, name_of, names, redirect

WHOLE = (I64, ir.DataType.INT32, BOOL)
SMALL = 64  # numbers: what describes a shape has not more
UNTOUCHED = ("Constant", "RandomNormalLike", "RandomUniformLike")
# operators that ONNX defines by other operators, whose shapes it does not infer alone: shaped like their first input
LIKE_FIRST = ("GroupNormalization", "RMSNormalization", "Gelu", "Attention")


def fix_lengths(model: ir.Model, lengths: Mapping[str, int]) -> int:
    """Give the named dimensions in `lengths` these lengths, everywhere in the graph; how many nodes fell away.

    Other names stay names, and what is computed from them stays computed.
    """
    before = len(model.graph)
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else lengths.get(d.value or "", d) for d in value.shape])
    known: dict[ir.Value, Array] = {}
    for value in model.graph.initializers.values():
        if value.dtype in WHOLE and value.const_value is not None and value.const_value.size <= SMALL:
            known[value] = value.const_value.numpy()
    for node in list(model.graph):
        numbers = _numbers(model, node, known)
        if numbers is None:
            _infer(model, node, known)
            continue
        for output, array in zip(node.outputs, numbers, strict=True):
            known[_constant(model, output, array)] = array
    drop_unused(model)
    return before - len(model.graph)


def _numbers(model: ir.Model, node: ir.Node, known: Mapping[ir.Value, Array]) -> list[Array] | None:
    """The outputs of a node that computes whole numbers from shapes that are known; None for all others."""
    if node.op_type == "Shape":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None:
            return None
        asked = list(shape)[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
        return [np.array(asked, np.int64)] if all(isinstance(d, int) for d in asked) else None
    if node.op_type in UNTOUCHED or node.domain or not node.inputs:
        return None
    if not all(output.dtype in (None, *WHOLE) for output in node.outputs):
        return None
    if not all(value is None or value in known for value in node.inputs):
        return None
    arrays = {name_of(value): known[value] for value in node.inputs if value is not None}
    found = _computed(node, arrays, model.graph.opset_imports[""])
    return found if all(array.size <= SMALL and array.dtype.kind in "ib" for array in found) else None


def _computed(node: ir.Node, arrays: Mapping[str, Array], opset: int) -> list[Array]:
    """The outputs of one node, by ONNX's reference implementation."""
    info, dtype = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    inputs = [info(name, dtype(array.dtype), array.shape) for name, array in arrays.items()]
    outputs = [info(name_of(v), int(v.dtype or ir.DataType.UNDEFINED), None) for v in node.outputs]
    alone = onnx.helper.make_graph([ir.serde.serialize_node(node)], "alone", inputs, outputs)
    model = onnx.helper.make_model(alone, opset_imports=[onnx.helper.make_opsetid("", opset)])
    found = cast(list[Any], ReferenceEvaluator(model).run(None, dict(arrays)))
    return [np.asarray(array) for array in found]


def _constant(model: ir.Model, output: ir.Value, array: Array) -> ir.Value:
    """The constant that the readers of `output` read from now on."""
    name = names.constant(f"{name_of(output)}/fixed")
    constant = ir.Value(name=name, shape=ir.Shape(array.shape))
    constant.const_value = ir.Tensor(array, name=name)
    constant.type = ir.TensorType(constant.const_value.dtype)
    model.graph.register_initializer(constant)
    redirect(output, constant)
    return constant


def _infer(model: ir.Model, node: ir.Node, known: Mapping[ir.Value, Array]) -> None:
    """Give the outputs of a node the shapes that follow from its inputs; what ONNX cannot tell stays as it is."""
    if node.op_type in LIKE_FIRST and node.inputs[0] is not None and node.inputs[0].shape is not None:
        _merge(node.outputs[0], [d if isinstance(d, int) else d.value for d in node.inputs[0].shape])
        return
    types, data = dict[str, Any](), dict[str, Any]()
    for value in node.inputs:
        if value is None:
            continue
        array = known.get(value, None if value.const_value is None else _small(value))
        if array is not None:
            data[name_of(value)] = onnx.numpy_helper.from_array(array, name_of(value))
        proto = _type_of(value)
        if proto is None:
            return
        types[name_of(value)] = proto
    try:
        schema: Any = cast(Any, onnx.defs).get_schema(node.op_type, model.graph.opset_imports[""], node.domain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = cast(Any, onnx.shape_inference).infer_node_outputs(
                schema,
                ir.serde.serialize_node(node),
                types,
                data,
                opset_imports=[onnx.helper.make_opsetid("", model.graph.opset_imports[""])],
                ir_version=model.ir_version,
            )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError):
        return
    for output in node.outputs:
        if output.name in found and found[output.name].tensor_type.HasField("shape"):
            dims = found[output.name].tensor_type.shape.dim
            _merge(output, [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims])


def _merge(output: ir.Value, dims: list[int | str | None]) -> None:
    """The inferred dimensions; where nothing is inferred, what the graph said before."""
    old = list(output.shape) if output.shape is not None and len(output.shape) == len(dims) else [None] * len(dims)
    output.shape = ir.Shape([o if d is None else d for d, o in zip(dims, old, strict=True)])


def _small(value: ir.Value) -> Array | None:
    tensor = value.const_value
    if tensor is None or tensor.size > SMALL or tensor.dtype not in (*WHOLE, ir.DataType.FLOAT):
        return None
    return tensor.numpy()


def _type_of(value: ir.Value) -> Any:
    """The type of a value as ONNX writes it; None where its element type is not known."""
    if value.dtype is None:
        return None
    shape = None
    if value.shape is not None:
        shape = [d if isinstance(d, int) else d.value for d in value.shape]
    return onnx.helper.make_tensor_type_proto(int(value.dtype), shape)
