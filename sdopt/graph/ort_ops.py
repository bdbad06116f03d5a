"""A graph in the operators that ONNX Runtime's CPU kernels are fast at; the weights stay in the file where they are.

| the bundle's graph (opset 23)                 | becomes                                                          |
|-----------------------------------------------|------------------------------------------------------------------|
| Reshape, Transpose, Attention, and back again | com.microsoft MultiHeadAttention: blocks that stay in the cache   |
| GroupNormalization                            | InstanceNormalization of the groups, then BatchNormalization for  |
|                                               | scale and bias: without a kernel for it, it is taken apart into   |
|                                               | about 20 nodes                                                    |

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
    """Write NAME.ort.onnx beside the graph NAME.onnx, reading the same weights; None where there is nothing to gain."""
    model = load(path)
    if not ort_ops(model):
        return None
    target = path.with_suffix(f".ort{path.suffix}")
    ir.save(model, target)
    return target


def ort_ops(model: ir.Model) -> int:
    """How many nodes of `model`, which is changed in place, were replaced; what has another form is left as it is."""
    replaced = 0
    sizes: dict[tuple[str, ...], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "GroupNormalization" and model.graph.opset_imports[""] >= 21:
            replaced += _group_norm(model, node, sizes)
        elif node.op_type == "Attention":
            replaced += _attention(model, node)
    drop_unused(model)
    return replaced


def _group_norm(model: ir.Model, node: ir.Node, sizes: dict[tuple[str, ...], ir.Value]) -> bool:
    """`sizes` holds the shapes that were measured for earlier nodes, by the names of their dimensions."""
    x, scale, bias = (cast(ir.Value, value) for value in node.inputs)
    channels = x.shape[1] if x.shape is not None else None
    if x.dtype != F32 or x.shape is None or not isinstance(channels, int) or node.outputs[0] in model.graph.outputs:
        return False
    groups = attribute(node, "num_groups")
    write, shared = Writer(model, f"{name_of(node)}/", before=node), Writer(model, "ort/")

    def filled(length: int, number: float) -> ir.Value:
        return shared.constant(f"{number:.0f}_{length}", [number] * length, F32)

    apart = shared.constant(f"groups_{groups}", [0, groups, -1], I64)
    grouped = write("Reshape", [x, apart], "grouped", shape=(x.shape[0], groups, None))
    inputs = [grouped, filled(groups, 1), filled(groups, 0)]
    unit = write("InstanceNormalization", inputs, "unit", epsilon=attribute(node, "epsilon", 1e-5))
    named = tuple(str(d if isinstance(d, int) else d.value or x.name) for d in x.shape)  # unnamed: this tensor's own
    if named not in sizes:
        sizes[named] = write("Shape", [x], "size", dtype=I64, shape=(rank(x),))
    back = write("Reshape", [unit, sizes[named]], "back", shape=x.shape)
    inputs = [back, scale, bias, filled(channels, 0), filled(channels, 1)]  # of mean 0 and variance 1: x scale + bias
    redirect(node.outputs[0], write("BatchNormalization", inputs, "scaled", epsilon=0.0))
    return True


def _attention(model: ir.Model, node: ir.Node) -> bool:
    """Heads of queries, keys and values side by side in, heads side by side out."""
    query, flat, merged = node.inputs[0], [_flat(value) for value in node.inputs[:3]], _merged(node.outputs[0])
    others = [value for value in node.inputs[3:] if value is not None]  # a mask, a cache
    others += [name for name in ("is_causal", "softcap", "q_num_heads", "kv_num_heads") if attribute(node, name, 0)]
    others += [value for value in model.graph.outputs if value is merged]
    if None in flat or merged is None or others or query is None or query.shape is None:
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
    """[batch, tokens, heads * features] behind [batch, heads, tokens, features]; None if it is made otherwise."""
    transpose = value.producer() if value is not None else None
    if value is None or transpose is None or not _moves_heads(transpose):
        return None
    split = transpose.inputs[0]
    reshape = split.producer() if split is not None else None
    flat = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    if flat is None or flat.shape is None or value.shape is None or rank(flat) != 3:
        return None
    heads, features, together = value.shape[1], value.shape[3], flat.shape[2]
    return flat if isinstance(heads, int) and isinstance(features, int) and heads * features == together else None


def _merged(value: ir.Value) -> ir.Value | None:
    """What becomes of [batch, heads, tokens, features] when its heads are put side by side; None if they are not."""
    for op, dims in (("Transpose", 4), ("Reshape", 3)):
        readers = [node for node, _ in value.uses()]
        if len(readers) != 1 or readers[0].op_type != op or (op == "Transpose" and not _moves_heads(readers[0])):
            return None
        value = readers[0].outputs[0]
        if value.shape is None or rank(value) != dims:
            return None
    return value


def _moves_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(attribute(node, "perm", ())) == TO_HEADS
