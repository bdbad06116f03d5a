"""A linear layer whose result is split becomes one linear layer for each part.

The feed-forward layers of the transformer blocks make a value and its gate in one product and then take them apart
(Shazeer 2020, arXiv:2002.05202). Two products make them where they are needed: nothing is copied, and an engine may
let the GELU of the gate take in its bias. Every number is the same sum as before.

Measured on two CPU cores: a call of Stable Diffusion 1.5's UNet at 512x512 on OpenVINO in bfloat16 is 1.024 times as
fast, one of the embedded model's UNet on ONNX Runtime in float32 1.027 times.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdopt.graph import Writer, attribute, constant_of, drop_unused, name_of, names, rank, redirect


def split_linears(model: ir.Model) -> int:
    """Take the weights of such layers apart, in place; the number of layers."""
    found = sum(_part(model, node) for node in list(model.graph) if node.op_type == "Split")
    drop_unused(model)
    return found


def _part(model: ir.Model, node: ir.Node) -> bool:
    added = _made_by(node.inputs[0], "Add")
    product = _made_by(added.inputs[0], "MatMul") if added else None
    if added is None or product is None or any(value in model.graph.outputs for value in node.outputs):
        return False
    (x, weight), bias, count = product.inputs, added.inputs[1], len(node.outputs)
    columns, offset = constant_of(weight), constant_of(bias)
    if columns is None or offset is None or (columns.ndim, offset.ndim) != (2, 1) or columns.shape[1] % count:
        return False
    if attribute(node, "num_outputs") != count or attribute(node, "axis", 0) not in (-1, rank(node.outputs[0]) - 1):
        return False
    write, width = Writer(model, f"{name_of(node)}/", before=product), columns.shape[1] // count
    for i, old in enumerate(node.outputs):
        own = range(i * width, (i + 1) * width)
        part = write("MatMul", [x, _cut(model, weight, 1, own)], f"product_{i}", shape=old.shape)
        redirect(old, write("Add", [part, _cut(model, bias, 0, own)], f"part_{i}", shape=old.shape))
    return True


def _cut(model: ir.Model, value: ir.Value | None, axis: int, own: range) -> ir.Value:
    """The initializer of a part of `value`, named as that part."""
    array = constant_of(value)
    assert value is not None
    assert array is not None
    name = names.part(name_of(value), axis, own.start, own.stop, array.ndim)
    if name not in model.graph.initializers:
        array = np.ascontiguousarray(np.take(array, own, axis))
        new = ir.Value(name=name, type=value.type, shape=ir.Shape(array.shape))
        new.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
        model.graph.register_initializer(new)
    return model.graph.initializers[name]


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that makes `value`, if it is an `op` that makes it for one reader only."""
    maker = value.producer() if value is not None else None
    return maker if maker is not None and maker.op_type == op and len(maker.outputs[0].uses()) == 1 else None
