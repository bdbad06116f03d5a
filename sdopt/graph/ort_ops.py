"""Write a graph in operators for which ONNX Runtime has fast CPU kernels. It reads the same file of weights.

| the bundle's graph (opset 23)                 | becomes                                                          |
|-----------------------------------------------|------------------------------------------------------------------|
| Reshape, Transpose, Attention, and back again | com.microsoft MultiHeadAttention: its blocks stay in the cache    |
| GroupNormalization                            | InstanceNormalization of the groups, then BatchNormalization for  |
|                                               | scale and bias. ONNX Runtime has no kernel for it, and would      |
|                                               | make about 20 nodes of it                                         |

Ref: Dao et al. 2022, arXiv:2205.14135, algorithm 1, for the attention; Wu & He 2018, arXiv:1803.08494, for the norm.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import onnx_ir as ir

from sdopt.graph import F32, I64, Writer, attribute, drop_unused, load, name_of, rank, redirect

DOMAIN = "com.microsoft"
TO_HEADS = (0, 2, 1, 3)  # [batch, tokens, heads, features] <-> [batch, heads, tokens, features]


def write_ort_graph(path: Path) -> Path | None:
    """Write NAME.ort.onnx, with the same file of weights, next to NAME.onnx. None if no node would be replaced."""
    model = load(path)
    if not ort_ops(model):
        return None
    target = path.with_suffix(f".ort{path.suffix}")
    ir.save(model, target)
    return target


def ort_ops(model: ir.Model) -> int:
    """Replace the nodes of `model` in place, and return how many were replaced. Nodes of another form stay."""
    replaced = 0
    has_channel_scales = model.graph.opset_imports[""] >= 21  # older group norms have one scale for each group
    sizes: dict[tuple[str, ...], ir.Value] = {}
    for node in list(model.graph):
        was_replaced = False
        if node.op_type == "GroupNormalization" and has_channel_scales:
            was_replaced = _group_norm(model, node, sizes)
        elif node.op_type == "Attention":
            was_replaced = _attention(model, node)
        if was_replaced:
            replaced += 1
    drop_unused(model)
    return replaced


def _group_norm(model: ir.Model, node: ir.Node, sizes: dict[tuple[str, ...], ir.Value]) -> bool:
    """Replace one group norm. Whether it could be replaced.

    `sizes` has the Shape outputs that were written for earlier nodes, by the names of the dimensions.
    """
    x, scale, bias = (cast(ir.Value, value) for value in node.inputs)
    channels = x.shape[1] if x.shape is not None else None
    if x.dtype != F32 or x.shape is None or not isinstance(channels, int) or node.outputs[0] in model.graph.outputs:
        return False
    groups = attribute(node, "num_groups")
    write, shared = Writer(model, f"{name_of(node)}/", before=node), Writer(model, "ort/")

    def repeated(length: int, number: float) -> ir.Value:
        return shared.constant(f"{number:.0f}_{length}", [number] * length, F32)

    apart = shared.constant(f"groups_{groups}", [0, groups, -1], I64)
    grouped = write("Reshape", [x, apart], "grouped", shape=(x.shape[0], groups, None))
    inputs = [grouped, repeated(groups, 1), repeated(groups, 0)]
    unit = write("InstanceNormalization", inputs, "unit", epsilon=attribute(node, "epsilon", 1e-5))
    # an unnamed dimension has the tensor's name as its key, so it equals no dimension of another tensor
    key = tuple(str(d if isinstance(d, int) else d.value or x.name) for d in x.shape)
    if key not in sizes:
        sizes[key] = write("Shape", [x], "size", dtype=I64, shape=(rank(x),))
    back = write("Reshape", [unit, sizes[key]], "back", shape=x.shape)
    inputs = [back, scale, bias, repeated(channels, 0), repeated(channels, 1)]  # mean 0, variance 1: x * scale + bias
    redirect(node.outputs[0], write("BatchNormalization", inputs, "scaled", epsilon=0.0))
    return True


def _attention(model: ir.Model, node: ir.Node) -> bool:
    """Replace one attention by MultiHeadAttention, with the heads side by side. Whether it could be replaced."""
    query, merged = node.inputs[0], _merged(node.outputs[0])
    flat = [_flat(value) for value in node.inputs[:3]]
    has_mask_or_cache = any(value is not None for value in node.inputs[3:])
    has_options = any(attribute(node, name, 0) for name in ("is_causal", "softcap", "q_num_heads", "kv_num_heads"))
    if None in flat or merged is None or query is None or query.shape is None or has_mask_or_cache or has_options:
        return False
    if any(value is merged for value in model.graph.outputs):
        return False
    heads, features = query.shape[1], query.shape[3]
    if not isinstance(heads, int) or not isinstance(features, int):
        return False
    scale = attribute(node, "scale") or 1 / math.sqrt(features)
    write = Writer(model, f"{name_of(node)}/", before=node)
    mixed = write("MultiHeadAttention", flat, "mixed", shape=merged.shape, domain=DOMAIN, num_heads=heads, scale=scale)
    model.graph.opset_imports[DOMAIN] = 1
    redirect(merged, mixed)
    return True


def _flat(value: ir.Value | None) -> ir.Value | None:
    """The [batch, tokens, heads * features] that `value`, [batch, heads, tokens, features], was made from.

    None if it was made in another way.
    """
    transpose = value.producer() if value is not None else None
    if value is None or transpose is None or not _moves_heads(transpose):
        return None
    split = transpose.inputs[0]
    reshape = split.producer() if split is not None else None
    flat = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    if flat is None or flat.shape is None or value.shape is None or rank(flat) != 3:
        return None
    heads, features = value.shape[1], value.shape[3]
    if not isinstance(heads, int) or not isinstance(features, int):
        return None
    return flat if heads * features == flat.shape[2] else None


def _merged(value: ir.Value) -> ir.Value | None:
    """The [batch, tokens, heads * features] that is made from `value`, [batch, heads, tokens, features].

    None if its heads are not put side by side, or if something else reads it too.
    """
    for op, dims in (("Transpose", 4), ("Reshape", 3)):
        readers = [node for node, _ in value.uses()]
        if len(readers) != 1 or readers[0].op_type != op:
            return None
        if op == "Transpose" and not _moves_heads(readers[0]):
            return None
        value = readers[0].outputs[0]
        if value.shape is None or rank(value) != dims:
            return None
    return value


def _moves_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(attribute(node, "perm", ())) == TO_HEADS
