"""Replace the computed repeats in a fused step by fixed ones.

`sdopt.export.guidance_prefix` repeats a tensor where it first meets the prompt. The bundle's UNet computes the count
from its inputs. In a fused step the count is known, 1 or 2:

    Tile(x, [prompts / images, 1, 1, ...])     becomes     Concat(x, x)     guided: the same numbers, a known length
                                                           x                the conditional half alone
"""

from __future__ import annotations

import onnx_ir as ir

from sdopt.graph import Writer, attribute, constant_of, drop_unused, name_of, redirect


def join_halves(model: ir.Model, copies: int) -> int:
    """Replace every computed repeat of a fused step by `copies` (1 or 2) of its tensor. Returns how many there were."""
    repeats = [node for node in model.graph if node.op_type == "Tile" and _repeats_halves(node)]
    for node in repeats:
        value, repeated = node.inputs[0], node.outputs[0]
        assert value is not None
        if copies == 1:
            redirect(repeated, value)
            continue
        write = Writer(model, "", before=node)
        name = f"{name_of(node)}/joined"
        redirect(repeated, write("Concat", [value] * copies, name, axis=0, shape=repeated.shape))
    drop_unused(model)
    return len(repeats)


def _repeats_halves(tile: ir.Node) -> bool:
    """Whether only the first axis is repeated, by the ratio of two lengths."""
    counts = _maker(tile.inputs[1])
    if counts is None or counts.op_type != "Concat" or len(counts.inputs) != 2:
        return False
    ratio, ones = _maker(counts.inputs[0]), constant_of(counts.inputs[1])
    if ratio is None or ratio.op_type != "Div" or ones is None or not (ones == 1).all():
        return False
    lengths = [_maker(value) for value in ratio.inputs]
    return all(node is not None and node.op_type == "Shape" and attribute(node, "end") == 1 for node in lengths)


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
