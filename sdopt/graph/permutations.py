"""An Einsum of one tensor that only moves its axes becomes a Transpose, which every library has in every precision."""

from __future__ import annotations

import onnx_ir as ir

from sdopt.graph import attribute, redirect


def transpose_permutations(model: ir.Model) -> int:
    """Replace each such Einsum of `model` in place, and return how many there were."""
    replaced = 0
    for node in list(model.graph):
        if node.op_type == "Einsum" and len(node.inputs) == 1 and node.outputs[0] not in model.graph.outputs:
            order = _order(str(attribute(node, "equation", "")))
            if order is not None:
                _replace(model, node, order)
                replaced += 1
    return replaced


def _replace(model: ir.Model, node: ir.Node, order: list[int]) -> None:
    old = node.outputs[0]
    new = ir.node("Transpose", node.inputs, {"perm": order}, name=node.name)
    value, name = new.outputs[0], old.name
    value.shape, value.type = old.shape, old.type
    model.graph.insert_before(node, new)
    redirect(old, value)
    model.graph.remove(node, safe=True)
    value.name = name


def _order(equation: str) -> list[int] | None:
    """The axes in their new order: [0, 2, 1] of "abc->acb"; None for an equation that does more than move them."""
    before, arrow, after = equation.replace(" ", "").partition("->")
    moves = bool(arrow) and before.isalpha() and len(set(before)) == len(before) and sorted(before) == sorted(after)
    return [before.index(axis) for axis in after] if moves else None
