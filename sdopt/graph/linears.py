"""Replace a linear layer whose output is split by one linear layer for each part.

The feed-forward layers of the transformer blocks compute a value and its gate in one product and then split them
(Shazeer 2020, arXiv:2002.05202). With two products nothing is copied, and an engine may fuse the bias of the gate into
its GELU. Every number is the same sum as before.

Measured on two CPU cores: a call of Stable Diffusion 1.5's UNet at 512x512 on OpenVINO in bfloat16 is 1.024 times as
fast, one of the embedded model's UNet on ONNX Runtime in float32 1.027 times.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from sdopt.graph import Writer, attribute, drop_unused, name_of, names, rank, redirect


def split_linears(model: ir.Model) -> int:
    """Split these layers of `model` in place, and return how many there were."""
    replaced = 0
    for node in list(model.graph):
        if node.op_type == "Split" and _split_layer(model, node):
            replaced += 1
    drop_unused(model)
    return replaced


def _split_layer(model: ir.Model, node: ir.Node) -> bool:
    """Replace the linear layer in front of the Split `node`. Whether there is one that can be replaced."""
    added = _made_by(node.inputs[0], "Add")
    product = _made_by(added.inputs[0], "MatMul") if added else None
    if added is None or product is None or any(value in model.graph.outputs for value in node.outputs):
        return False
    (x, weight), bias, count = product.inputs, added.inputs[1], len(node.outputs)
    columns, offset = (value.const_value if value is not None else None for value in (weight, bias))
    if columns is None or offset is None or (len(columns.shape), len(offset.shape)) != (2, 1):
        return False
    outputs = int(columns.shape.numpy()[1])
    if outputs % count:
        return False
    last_axis = rank(node.outputs[0]) - 1
    if attribute(node, "num_outputs") != count or attribute(node, "axis", 0) not in (-1, last_axis):
        return False
    write = Writer(model, f"{name_of(node)}/", before=product)
    width = outputs // count
    for i, old in enumerate(node.outputs):
        part = range(i * width, (i + 1) * width)
        multiplied = write("MatMul", [x, _cut(model, weight, 1, part)], f"product_{i}", shape=old.shape)
        redirect(old, write("Add", [multiplied, _cut(model, bias, 0, part)], f"part_{i}", shape=old.shape))
    return True


def _cut(model: ir.Model, value: ir.Value | None, axis: int, part: range) -> ir.Value:
    """The initializer for one part of `value` along `axis`. Its name says which part it is."""
    assert value is not None
    tensor = value.const_value
    assert tensor is not None
    name = names.part(name_of(value), axis, part.start, part.stop, len(tensor.shape))
    if name not in model.graph.initializers:
        shape = list(tensor.shape.numpy())
        shape[axis] = len(part)
        new = ir.Value(name=name, type=value.type, shape=ir.Shape(shape))
        new.const_value = ir.LazyTensor(partial(_taken, tensor, axis, part), tensor.dtype, ir.Shape(shape), name=name)
        model.graph.register_initializer(new)
    return model.graph.initializers[name]


def _taken(tensor: ir.TensorProtocol, axis: int, part: range) -> ir.TensorProtocol:
    """One part of a tensor. It is copied when it is read, so that a large graph has its weights in memory once."""
    return ir.Tensor(np.ascontiguousarray(np.take(tensor.numpy(), part, axis)), dtype=tensor.dtype)


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that computes `value`, if it is an `op` whose output has only one reader."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type != op:
        return None
    return maker if len(maker.outputs[0].uses()) == 1 else None
