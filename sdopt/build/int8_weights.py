"""Round weights to int8, and nothing else: what is multiplied with them keeps its precision.

    W as int8, scales --DequantizeLinear--> MatMul                  scales: one for `BLOCK` inputs of an output
    table as int8 --Gather--> Cast --Mul(scale of the row)--> rows  scales: one for each row

The graph stays standard ONNX, and no picture is needed. ONNX Runtime and OpenVINO keep such weights as int8 in memory
and make them wide where they are multiplied, so that a model takes a quarter of its float32 memory.
Scales are symmetric. Those of blocks need opset 21; before it, and where a width is no whole number of blocks, there is
one scale for each output. Ref: Dettmers et al. 2022, arXiv:2208.07339, section 2, for scales of a part of a matrix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from sdopt.build.int8 import INT8, LARGEST, layers_of
from sdopt.bundle.specs import Array, Float32
from sdopt.graph import F32, Writer, attribute, drop_unused, name_of, redirect, release

BLOCK = 128  # inputs that share a scale
BLOCKS_FROM = 21  # the opset whose DequantizeLinear has them
LEAST = 1 << 16  # numbers of a table that is worth two Gathers


def round_weights(model: ir.Model, for_tensorrt: bool = False) -> int:
    """Round the weights of linear layers and tables in place. Returns how many linear layers there are.

    TensorRT takes no scales of blocks, and int8 in front of a DequantizeLinear alone: tables stay as they are for it.
    The rounded numbers are computed when they are written.
    """
    layers = [layer for layer in layers_of(model) if not layer.is_conv]
    blocks = not for_tensorrt and (model.opset_imports.get("") or 0) >= BLOCKS_FROM
    for layer in layers:
        weight = model.graph.initializers[layer.weight]
        inputs = layer.shape[0]
        block = BLOCK if blocks and inputs % BLOCK == 0 else inputs
        how: dict[str, Any] = {"axis": 0, "block_size": block} if block < inputs else {"axis": 1}
        write = Writer(model, f"{name_of(layer.node)}/int8/", before=layer.node)
        wide = write("DequantizeLinear", _rounded(model, weight, block), "weight", dtype=F32, **how)
        layer.node.replace_input_with(1, wide)
    for node in list(model.graph):
        if node.op_type == "Gather" and not for_tensorrt:
            _round_table(model, node)
    drop_unused(model)
    return len(layers)


def _rounded(model: ir.Model, weight: ir.Value, block: int, axis: int = 0) -> list[ir.Value]:
    """[the weight as int8, its scales] as initializers: one scale for each `block` numbers along `axis` of a matrix.

    The scales are [blocks, outputs], [outputs] for one block, and [rows, 1] along axis 1.
    """
    write, tensor = Writer(model, f"{name_of(weight)}/int8/"), weight.const_value
    assert tensor is not None
    assert weight.shape is not None
    scales = _scales(tensor, block, axis)
    sizes = write.constant("weight_scale", scales[0] if axis == 0 and len(scales) == 1 else scales, F32)
    numbers = write.constant("weight", np.zeros(0), INT8)
    if numbers.shape != weight.shape:  # it is new
        numbers.shape, compute = ir.Shape(weight.shape), partial(_numbers, tensor, scales, block, axis)
        numbers.const_value = ir.LazyTensor(compute, INT8, numbers.shape, name=name_of(numbers))
    return [numbers, sizes]


def _scales(tensor: ir.TensorProtocol, block: int, axis: int) -> Float32:
    largest = np.abs(_in_blocks(tensor, block, axis)).max(axis + 1)
    release(tensor)
    return np.maximum(largest / LARGEST["int8"], np.finfo(np.float32).tiny).astype(np.float32)


def _numbers(tensor: ir.TensorProtocol, scales: Float32, block: int, axis: int) -> ir.TensorProtocol:
    numbers = np.rint(_in_blocks(tensor, block, axis) / np.expand_dims(scales, axis + 1)).astype(np.int8)
    release(tensor)
    return ir.Tensor(numbers.reshape(tensor.shape.numpy()), dtype=INT8)


def _in_blocks(tensor: ir.TensorProtocol, block: int, axis: int) -> Array:
    """A matrix in float32, its `axis` split in two: blocks, and the numbers of a block."""
    shape = list(tensor.shape.numpy())
    shape[axis : axis + 1] = [shape[axis] // block, block]
    return tensor.numpy().astype(np.float32).reshape(shape)


def _round_table(model: ir.Model, node: ir.Node) -> None:
    """Look up rows of int8 in place of a large table's own rows."""
    table, (rows, indices) = node.inputs[0], (node.outputs[0], node.inputs[1])
    while table is not None and table.const_value is None:
        maker = table.producer()
        table = maker.inputs[0] if maker is not None and maker.op_type == "Cast" else None
    if table is None or table.const_value is None or attribute(node, "axis", 0) != 0:
        return
    shape = table.const_value.shape.numpy()
    if len(shape) != 2 or table.const_value.size < LEAST or rows.dtype != F32 or rows.shape is None:
        return
    numbers, sizes = _rounded(model, table, shape[1], axis=1)
    write = Writer(model, f"{name_of(node)}/int8/", before=node)
    short = write("Gather", [numbers, indices], "rows", dtype=INT8, shape=rows.shape, axis=0)
    size = write("Gather", [sizes, indices], "sizes", shape=[*rows.shape[:-1], 1], axis=0)
    wide = write("Cast", [short], "wide", dtype=F32, to=F32.value)
    redirect(rows, write("Mul", [wide, size], "scaled"))
