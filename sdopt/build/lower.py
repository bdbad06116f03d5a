"""Rewrite a graph of opset 18 to 23 with older operators.

`lower` writes the whole graph in opset 17, which TensorRT 8.6 parses. `lower_operators` replaces only the operators
that the parser of a newer TensorRT does not know.

The source is the bundle's own graph (opset 23). It has one node for each concept, so each concept is lowered in one
place. After `half`, norms compute in float32 between two Casts, as their `stash_type` says. Attention scores are half.

| opset 23                             | becomes                                                                 |
|--------------------------------------|-------------------------------------------------------------------------|
| Attention                            | Softmax(Q K^T, masked) V; Q is scaled first, which helps float16        |
| GroupNormalization                   | (x - mean) / sqrt(variance + epsilon) in float32, then scale and bias   |
| InstanceNormalization (also of 17)   | the same: 8.6 makes it a cuDNN plugin                                   |
| RMSNormalization                     | x / sqrt(mean of squares + epsilon) in float32, then scale              |
| Gelu                                 | x/2 (1 + Erf(x / sqrt 2)), or with Tanh                                 |
| ReduceMean and its like              | axes as an attribute                                                    |
| Shape with start or end (also of 17) | Shape, Slice                                                            |
| Split, Resize, Reshape, Cast         | without later attributes that have their default value                  |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, cast

import onnx
import onnx_ir as ir

from sdopt.errors import UsageError
from sdopt.graph import F32, I64, Writer, attribute, constant_of, drop_unused, name_of, rank, redirect

OPSET = 17
Rule = Callable[[Writer, ir.Node], ir.Value]
LOWEST = {ir.DataType.FLOAT16: -65504.0}  # in place of minus infinity; -3e38 in other types
# attributes that opset 17 does not have -> the value with which the node computes the same without them
ANY = object()
IMPLIED: dict[str, dict[str, Any]] = {
    "Split": {"num_outputs": ANY},  # before opset 18, a Split without sizes makes equal parts
    "Reshape": {"allowzero": ANY},  # our dimensions are never 0
    "Cast": {"saturate": 1, "round_mode": "up"},
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": "stretch", "axes": None},
}


def lower(model: ir.Model, *, ir_version: int = 8) -> ir.Model:
    """Change `model`, which may be float32 or half, to opset 17 in place. It computes the same.

    Raises: UsageError naming the operators, attributes and inputs that opset 17 does not have.
    """
    _refuse_old_norms(model)
    _apply_rules(model, RULES)
    for node in model.graph:
        if node.op_type in REDUCTIONS:
            _axes_as_attribute(node)
        _drop_implied(node)
    drop_unused(model)
    problems = sorted({_problem(node) for node in model.graph} - {""})
    if problems:
        raise UsageError(f"no form in opset {OPSET}: {'; '.join(problems)}")
    model.graph.opset_imports.clear()
    model.graph.opset_imports[""] = OPSET
    model.ir_version = ir_version
    return model


def lower_operators(model: ir.Model, operators: Collection[str]) -> ir.Model:
    """Replace these operators in `model`, in place. Its opset and all its other operators stay.

    Raises: UsageError naming the operators that have no other form.
    """
    formless = sorted(set(operators) - set(RULES))
    if formless:
        raise UsageError(
            f"{', '.join(formless)}: there is no form in other operators; there is one for {', '.join(RULES)}"
        )
    if model.graph.opset_imports[""] <= OPSET:  # the rules write operators of opset 18
        return lower(model)
    if "GroupNormalization" in operators:
        _refuse_old_norms(model)
    _apply_rules(model, operators)
    drop_unused(model)
    return model


def _refuse_old_norms(model: ir.Model) -> None:
    if model.graph.opset_imports[""] < 21 and any(n.op_type == "GroupNormalization" for n in model.graph):
        raise UsageError("GroupNormalization before opset 21 has one scale per group; export the graph with --opset 23")


def _apply_rules(model: ir.Model, operators: Collection[str]) -> None:
    for node in list(model.graph):
        if node.op_type in operators and not node.domain:
            _replace(model, node, RULES[node.op_type])


def _drop_implied(node: ir.Node) -> None:
    """Remove the attributes that opset 17 does not have, if the node computes the same without them."""
    for name, value in IMPLIED.get(node.op_type, {}).items():
        if name not in node.attributes:
            continue
        if value is ANY or value == _text_of(attribute(node, name)):
            del node.attributes[name]


def _text_of(value: Any) -> Any:
    """An attribute's value, with bytes as text."""
    return value.decode() if isinstance(value, bytes) else value


def _replace(model: ir.Model, node: ir.Node, rule: Rule) -> None:
    """Replace `node` by the nodes that `rule` writes. The output of the last one takes the name of the old output."""
    old = node.outputs[0]
    if any(output.uses() or output in model.graph.outputs for output in node.outputs[1:]):
        raise UsageError(
            f"{node.op_type} {name_of(node)}: more than its first output is read; opset {OPSET} has no form"
        )
    new = rule(Writer(model, f"{name_of(node)}/", before=node), node)
    outputs = model.graph.outputs
    for index, output in enumerate(outputs):
        if output is old:
            outputs[index] = new
    redirect(old, new)
    name, shape = old.name, old.shape
    model.graph.remove(node, safe=True)
    new.name, new.shape = name, shape


def _problem(node: ir.Node) -> str:
    """What a node has that opset 17 does not; empty if there is nothing."""
    try:
        schema: Any = cast(Any, onnx.defs).get_schema(node.op_type, OPSET, node.domain)
    except onnx.defs.SchemaError:
        return f"operator {node.domain or 'ai.onnx'} {node.op_type}"
    unknown = [f"{node.op_type} with {name}" for name in node.attributes if name not in schema.attributes]
    if len(node.inputs) > schema.max_input:
        unknown.append(f"{node.op_type} with {len(node.inputs)} inputs")
    return "; ".join(unknown)


def _axes_as_attribute(node: ir.Node) -> None:
    """Make the axes of a reduction an attribute. They are an input since opset 18."""
    noop = attribute(node, "noop_with_empty_axes", 0)
    node.attributes.pop("noop_with_empty_axes", None)
    source = _optional(node, 1)
    axes = constant_of(source) if source is not None else None
    if axes is None and (source is not None or noop):
        raise UsageError(f"{node.op_type} {name_of(node)}: its axes are computed; opset {OPSET} takes constant ones")
    if len(node.inputs) > 1:
        node.resize_inputs(1)
    if axes is not None and axes.size:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes.reshape(-1).tolist())


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _wide(write: Writer, x: ir.Value) -> ir.Value:
    """`x` in float32."""
    return x if x.dtype == F32 else write("Cast", [x], "wide", dtype=F32, to=int(F32.value))


def _narrow(write: Writer, x: ir.Value, like: ir.Value) -> ir.Value:
    """The float32 value `x` in the type of `like`."""
    assert like.dtype is not None
    return x if like.dtype == F32 else write("Cast", [x], "narrow", dtype=like.dtype, to=int(like.dtype.value))


def _reduced(x: ir.Value, axes: list[int]) -> list[Any]:
    """The shape of `x` with 1 along `axes`."""
    assert x.shape is not None
    shape = list(x.shape)
    for axis in axes:
        shape[axis] = 1
    return shape


def _scaled_to_one(write: Writer, x: ir.Value, axes: list[int], epsilon: float) -> ir.Value:
    """x / sqrt(mean of its squares + epsilon)."""
    square = write("Mul", [x, x], "square")
    mean = _mean(write, square, axes, "variance")
    stable = write("Add", [mean, write.constant("epsilon", epsilon, F32)], "stable")
    return write("Div", [x, write("Sqrt", [stable], "spread")], "unit")


def _normalized(write: Writer, x: ir.Value, axes: list[int], epsilon: float) -> ir.Value:
    """(x - mean) / standard deviation over `axes`, of a float32 `x`."""
    mean = _mean(write, x, axes, "mean")
    return _scaled_to_one(write, write("Sub", [x, mean], "centred"), axes, epsilon)


def _mean(write: Writer, x: ir.Value, axes: list[int], name: str) -> ir.Value:
    return write("ReduceMean", [x, write.constant("axes", axes, I64)], name, keepdims=1, shape=_reduced(x, axes))


def _affine(write: Writer, x: ir.Value, scale: ir.Value, bias: ir.Value, dims: int) -> ir.Value:
    """scale * x + bias, both with one number for each channel. Channels are the second of `dims` dimensions."""
    column = write.constant("per_channel", [-1, *[1] * (dims - 2)], I64)
    shape = (None, *[1] * (dims - 2))
    scale = write("Reshape", [scale, column], "scale", shape=shape)
    bias = write("Reshape", [bias, column], "bias", shape=shape)
    return write("Add", [write("Mul", [x, scale], "scaled"), bias], "shifted")


def _group_norm(write: Writer, node: ir.Node) -> ir.Value:
    """Ref: Wu & He 2018, arXiv:1803.08494, eq. 1 and 7."""
    x, scale, bias = (_input(node, i) for i in range(3))
    assert x.shape is not None
    groups = attribute(node, "num_groups")
    apart = write.constant("groups", [0, groups, -1], I64)
    grouped = write("Reshape", [_wide(write, x), apart], "grouped", shape=(x.shape[0], groups, None))
    unit = _normalized(write, grouped, [2], attribute(node, "epsilon", 1e-5))
    size = write("Shape", [x], "size", dtype=I64, shape=(rank(x),))
    back = write("Reshape", [unit, size], "back", shape=x.shape)
    return _affine(write, _narrow(write, back, x), scale, bias, rank(x))


def _instance_norm(write: Writer, node: ir.Node) -> ir.Value:
    x, scale, bias = (_input(node, i) for i in range(3))
    unit = _normalized(write, _wide(write, x), list(range(2, rank(x))), attribute(node, "epsilon", 1e-5))
    return _affine(write, _narrow(write, unit, x), scale, bias, rank(x))


def _rms_norm(write: Writer, node: ir.Node) -> ir.Value:
    x, first = _input(node, 0), attribute(node, "axis", -1)
    axes = list(range(first % rank(x), rank(x)))
    unit = _scaled_to_one(write, _wide(write, x), axes, attribute(node, "epsilon", 1e-5))
    return write("Mul", [_narrow(write, unit, x), _input(node, 1)], "scaled")


def _gelu(write: Writer, node: ir.Node) -> ir.Value:
    """Ref: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2."""
    x = _input(node, 0)
    assert x.dtype is not None

    def number(name: str, value: float) -> ir.Value:
        return write.constant(name, value, cast(ir.DataType, x.dtype))

    if _text_of(attribute(node, "approximate", "none")) == "tanh":
        cube = write("Mul", [write("Mul", [x, x], "square"), x], "cube")
        bend = write("Mul", [cube, number("cubic", 0.044715)], "bend")
        inner = write("Add", [x, bend], "inner")
        angle = write("Mul", [inner, number("slope", math.sqrt(2 / math.pi))], "angle")
        bent = write("Tanh", [angle], "tanh")
    else:
        bent = write("Erf", [write("Div", [x, number("sqrt2", math.sqrt(2))], "deviations")], "erf")
    grown = write("Add", [bent, number("one", 1.0)], "grown")
    return write("Mul", [write("Mul", [x, grown], "twice"), number("half", 0.5)], "gelu")


def _attention(write: Writer, node: ir.Node) -> ir.Value:
    """Ref: Vaswani et al. 2017, arXiv:1706.03762, eq. 1."""
    q, k, v = (_input(node, i) for i in range(3))
    mask = _optional(node, 3)
    _check_attention(node, q, k)
    assert q.shape is not None
    assert k.shape is not None
    assert q.dtype is not None
    scale = attribute(node, "scale") or 1 / math.sqrt(cast(int, q.shape[3]))
    scaled = write("Mul", [q, write.constant("scale", scale, q.dtype)], "query")
    keys = write("Transpose", [k], "keys", perm=[0, 1, 3, 2], shape=[k.shape[0], k.shape[1], k.shape[3], k.shape[2]])
    scores = write("MatMul", [scaled, keys], "scores", shape=[*q.shape[:3], k.shape[2]])
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        lowest = write.constant("lowest", LOWEST.get(q.dtype, -3e38), q.dtype)
        scores = write("Where", [mask, scores, lowest], "masked", dtype=q.dtype, shape=scores.shape)
    elif mask is not None:
        scores = write("Add", [scores, mask], "masked")
    weights = write("Softmax", [scores], "weights", axis=-1)
    return write("MatMul", [weights, v], "mixed", shape=q.shape)


def _check_attention(node: ir.Node, q: ir.Value, k: ir.Value) -> None:
    """Raises: UsageError for what Stable Diffusion's graphs do not use: packed heads, causal, caches, soft caps."""
    refused = [name for name in ("is_causal", "softcap", "q_num_heads", "kv_num_heads") if attribute(node, name, 0)]
    if any(_optional(node, i) is not None for i in (4, 5, 6)):
        refused.append("a cache of past keys")
    q_heads, k_heads = _heads(q), _heads(k)
    if q_heads is None or q_heads != k_heads:
        refused.append("shapes that are not [batch, heads, tokens, features]")
    if refused:
        raise UsageError(f"Attention {name_of(node)}: {', '.join(refused)} cannot be lowered to opset {OPSET}")


def _heads(x: ir.Value) -> Any:
    """The number of heads of a tensor [batch, heads, tokens, features]; None for other shapes."""
    return x.shape[1] if x.shape is not None and rank(x) == 4 else None


def _shape(write: Writer, node: ir.Node) -> ir.Value:
    """Shape of some dimensions only. Opset 15 has it, but a parser of TensorRT 8 may not know it."""
    x = _input(node, 0)
    shape = write("Shape", [x], "whole", dtype=I64, shape=(rank(x),))
    first, last = attribute(node, "start", 0), attribute(node, "end", rank(x))
    if (first, last) == (0, rank(x)):
        return shape
    kept = range(rank(x))[first:last]
    start, stop = write.constant("from", [kept.start], I64), write.constant("to", [kept.stop], I64)
    return write("Slice", [shape, start, stop], "part", shape=(len(kept),))


RULES: dict[str, Rule] = {
    "Attention": _attention,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "RMSNormalization": _rms_norm,
    "Gelu": _gelu,
    "Shape": _shape,
}
REDUCTIONS = (
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceSumSquare",
)  # fmt: skip
