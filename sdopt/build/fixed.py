"""Write lengths that never change into the graph, so that a builder knows shapes that it would have to compute.

    sample [batch, 4, latent_height, latent_width]   with batch=1, latent_height=64, latent_width=64
    sample [1, 4, 64, 64];   Shape -> Gather -> Mul -> Concat -> Reshape   becomes   Reshape with constant numbers

One walk over the nodes gives each node the shapes that ONNX infers from its inputs. Integers that depend on known
shapes only are computed by ONNX's reference implementation, and become constants.
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

INTEGERS = (I64, ir.DataType.INT32, BOOL)
SMALL = 64  # elements; a tensor that describes a shape has no more
UNTOUCHED = ("Constant", "RandomNormalLike", "RandomUniformLike")
# ONNX does not infer the shapes of these. Their output has the shape of their first input.
LIKE_FIRST = ("GroupNormalization", "RMSNormalization", "Gelu", "Attention")


def fix_lengths(model: ir.Model, lengths: Mapping[str, int]) -> int:
    """Give the dimensions that `lengths` names these lengths, in the whole graph. Returns how many nodes fell away.

    Other names stay, and what is computed from them is still computed.
    """
    before = len(model.graph)
    for value in model.graph.inputs:
        if value.shape is not None:
            fixed = [d if isinstance(d, int) else lengths.get(d.value or "", d) for d in value.shape]
            value.shape = ir.Shape(fixed)
    known: dict[ir.Value, Array] = {}
    for value in model.graph.initializers.values():
        if value.dtype in INTEGERS and value.const_value is not None and value.const_value.size <= SMALL:
            known[value] = value.const_value.numpy()
    for node in list(model.graph):
        constants = _known_outputs(model, node, known)
        if constants is None:
            _infer(model, node, known)
            continue
        for output, array in zip(node.outputs, constants, strict=True):
            known[_constant(model, output, array)] = array
    drop_unused(model)
    return before - len(model.graph)


def _known_outputs(model: ir.Model, node: ir.Node, known: Mapping[ir.Value, Array]) -> list[Array] | None:
    """The outputs of a node that computes integers from known shapes; None for all other nodes."""
    if node.op_type == "Shape":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None:
            return None
        lengths = list(shape)[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
        return [np.array(lengths, np.int64)] if all(isinstance(d, int) for d in lengths) else None
    if node.op_type in UNTOUCHED or node.domain or not node.inputs:
        return None
    if not all(output.dtype in (None, *INTEGERS) for output in node.outputs):
        return None
    if not all(value is None or value in known for value in node.inputs):
        return None
    arrays = {name_of(value): known[value] for value in node.inputs if value is not None}
    outputs = _computed(node, arrays, model.graph.opset_imports[""])
    return outputs if all(array.size <= SMALL and array.dtype.kind in "ib" for array in outputs) else None


def _computed(node: ir.Node, arrays: Mapping[str, Array], opset: int) -> list[Array]:
    """The outputs of one node, by ONNX's reference implementation."""
    info, dtype = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    inputs = [info(name, dtype(array.dtype), array.shape) for name, array in arrays.items()]
    outputs = [info(name_of(v), int(v.dtype or ir.DataType.UNDEFINED), None) for v in node.outputs]
    graph = onnx.helper.make_graph([ir.serde.serialize_node(node)], "alone", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    results = cast(list[Any], ReferenceEvaluator(model).run(None, dict(arrays)))
    return [np.asarray(array) for array in results]


def _constant(model: ir.Model, output: ir.Value, array: Array) -> ir.Value:
    """A new constant that the readers of `output` read instead."""
    name = names.constant(f"{name_of(output)}/fixed")
    constant = ir.Value(name=name, shape=ir.Shape(array.shape))
    constant.const_value = ir.Tensor(array, name=name)
    constant.type = ir.TensorType(constant.const_value.dtype)
    model.graph.register_initializer(constant)
    redirect(output, constant)
    return constant


def _infer(model: ir.Model, node: ir.Node, known: Mapping[ir.Value, Array]) -> None:
    """Give the outputs of a node the shapes that follow from its inputs. Where ONNX infers none, they stay."""
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
            inferred = cast(Any, onnx.shape_inference).infer_node_outputs(
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
        if output.name in inferred and inferred[output.name].tensor_type.HasField("shape"):
            dims = inferred[output.name].tensor_type.shape.dim
            _merge(output, [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims])


def _merge(output: ir.Value, dims: list[int | str | None]) -> None:
    """Give `output` the inferred dimensions. A dimension that is not inferred keeps its length or name."""
    same_rank = output.shape is not None and len(output.shape) == len(dims)
    before = list(output.shape) if output.shape is not None and same_rank else [None] * len(dims)
    output.shape = ir.Shape([old if new is None else new for new, old in zip(dims, before, strict=True)])


def _small(value: ir.Value) -> Array | None:
    """The numbers of a small constant; None for all others."""
    tensor = value.const_value
    if tensor is None or tensor.size > SMALL or tensor.dtype not in (*INTEGERS, ir.DataType.FLOAT):
        return None
    return tensor.numpy()


def _type_of(value: ir.Value) -> Any:
    """The type of a value as ONNX writes it; None if its element type is not known."""
    if value.dtype is None:
        return None
    shape = None
    if value.shape is not None:
        shape = [d if isinstance(d, int) else d.value for d in value.shape]
    return onnx.helper.make_tensor_type_proto(int(value.dtype), shape)
