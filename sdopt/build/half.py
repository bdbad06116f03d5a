"""Convert a float32 graph to float16 or bfloat16, with float32 islands.

Every node computes in one type: the islands in float32, all others in half. A value that is also read in the other type
gets one Cast. Weights are converted one by one when they are written. They keep their names. A weight that is needed
in both types is called NAME in half and NAME@float32 in float32.

| stays float32                                   | because                                             |
|-------------------------------------------------|-----------------------------------------------------|
| `step/...`: guidance and the sampler's row      | the sample is float32 for the whole loop            |
| Sin, Cos and the nodes before them              | float16 has steps of 0.5 at timestep 999            |
| norms that do not compute in float32 themselves | a square leaves float16's range at 256              |
| readers of a weight outside float16's range     | it would be infinity, or 0                          |
| Resize, in bfloat16                             | TensorRT has none                                   |
| what the caller names                           | the attention of SD 2.1, blocks that `diagnose` found |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices
from sdopt.graph import (
    BF16,
    F16,
    F32,
    SHORT,
    Writer,
    attribute,
    behind,
    converted,
    drop_unused,
    is_float,
    name_of,
    names,
    redirect,
    release,
    weights,
)

TYPES = {"float16": F16, "bfloat16": BF16}
LARGEST, SMALLEST = 65504.0, 2.0**-25  # of float16; less than half of its smallest subnormal rounds to 0
MINUS_INFINITY = -1e30  # in a mask, a constant below this means minus infinity
OWN_FLOAT32 = ("GroupNormalization", "LayerNormalization", "RMSNormalization")  # with stash_type 1
STATISTICS = ("InstanceNormalization", "LpNormalization", "MeanVarianceNormalization", *OWN_FLOAT32)
SUMS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp")
ATTENTION = ("Attention", "Softmax")
ANY_TYPE = ("Cast", "Shape", "Size")  # their inputs may have any type
OWN_TYPE = ("ConstantOfShape", "Constant", "RandomNormalLike")  # an attribute sets the type of their output: float32
FLOAT32_INPUTS = {"Resize": (1, 2)}  # inputs that are float32 whatever the node computes in


@dataclass(frozen=True)
class HalfReport:
    """What `half` did: how many nodes are in half, and which stayed in float32 for which reason.

    `outside` maps each weight that half cannot hold to its largest absolute value; its readers are islands. `clamped`
    names the constants of masks that meant minus infinity. They became the least finite number.
    """

    dtype: str
    half_nodes: int
    casts: int
    islands: dict[str, str]
    outside: dict[str, float]
    clamped: tuple[str, ...]


def half(
    model: ir.Model,
    *,
    dtype: str = "float16",
    islands: Sequence[str] = (),
    attention: bool = False,
    half_edges: Collection[str] = (),
) -> HalfReport:
    """Change `model` in place to compute in `dtype` ("float16" or "bfloat16"). A second time changes nothing.

    `attention=True` keeps attention in float32 (SD 2.1). `islands` are the names or operators of further nodes to keep
    in float32; a name may be a pattern as in a shell: "node_conv2d_4*", "Softmax". Inputs and outputs stay float32,
    except those whose names match `half_edges`. A component in the manifest's `float16_unsafe` must not come here.
    Raises: UsageError for an unknown dtype, and for a pattern that matches nothing.
    """
    if dtype not in TYPES:
        raise UsageError(f"precision {dtype!r}; allowed are {choices(dtype, TYPES)}")
    _forget_casts(model)
    kept = _islands(model, dtype, islands, attention)
    outside, clamped = _outside(model, kept) if dtype == "float16" else ({}, ())
    _retype(model, TYPES[dtype], kept, _matching(model, half_edges))
    drop_unused(model)
    _name_weights(model, dtype)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    others = [node for node in model.graph if node.op_type != "Cast"]
    half_nodes = [node for node in others if any(value.dtype == TYPES[dtype] for value in node.outputs)]
    return HalfReport(
        dtype=dtype,
        half_nodes=len(half_nodes),
        casts=len(casts),
        islands={name: reason for name, reason in kept.items() if reason},
        outside=outside,
        clamped=clamped,
    )


def _forget_casts(model: ir.Model) -> None:
    """Remove every Cast between float types. `_retype` adds those that are needed.

    The readers of a cast weight read the weight itself, so a weight that is stored as float16 is float16 again.
    """
    outputs = set(model.graph.outputs)
    for node in list(model.graph):
        source, target = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Cast" or source is None or not (is_float(source) and is_float(target)):
            continue
        if target not in outputs:
            redirect(target, source)
            model.graph.remove(node, safe=True)
        elif source.producer() is not None and source not in outputs:  # its node computes the graph output itself
            name = target.name
            model.graph.outputs[list(model.graph.outputs).index(target)] = source
            redirect(target, source)
            model.graph.remove(node, safe=True)
            source.name, source.shape = name, target.shape


def _islands(model: ir.Model, dtype: str, patterns: Sequence[str], attention: bool) -> dict[str, str]:
    """Node name -> why it computes in float32."""
    reasons: dict[str, str] = {}
    nodes = [node for node in model.graph if any(map(is_float, (*node.inputs, *node.outputs)))]
    for node in nodes:
        reason = _reason(node, dtype, attention)
        if reason:
            reasons[name_of(node)] = reason
        if node.op_type in ("Sin", "Cos"):
            for source in _with_sources(node):
                reasons[name_of(source)] = "leads to the timestep embedding"
    for pattern in patterns:
        matching = [name_of(node) for node in nodes if node.op_type == pattern or fnmatchcase(name_of(node), pattern)]
        if not matching:
            operators = sorted({node.op_type for node in nodes})
            raise UsageError(f"island {pattern!r} matches no node of this graph; operators are {', '.join(operators)}")
        reasons.update((name, f"named by {pattern!r}") for name in matching)
    return reasons


def _reason(node: ir.Node, dtype: str, attention: bool) -> str:
    """Why a node computes in float32; empty if it does not."""
    only_joins = name_of(node).startswith("step/both")  # the two halves of guidance
    if name_of(node).startswith("step/") and not only_joins:
        return "the sampler's"
    computes_in_float32 = node.op_type in OWN_FLOAT32 and attribute(node, "stash_type", 1) == 1
    if node.op_type in STATISTICS and not computes_in_float32:
        return "statistics of a norm"
    if node.op_type in SUMS:
        return "a sum"
    if attention and node.op_type in ATTENTION:
        return "attention"
    if dtype == "bfloat16" and node.op_type == "Resize":
        return "no bfloat16 Resize in TensorRT"
    return ""


def _with_sources(node: ir.Node) -> Iterable[ir.Node]:
    """A node and all nodes that its floating-point inputs are computed from."""
    waiting, seen = [node], set[ir.Node]()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        makers = (value.producer() for value in current.inputs if value is not None and is_float(value))
        waiting.extend(maker for maker in makers if maker is not None)
    return seen


def _outside(model: ir.Model, kept: dict[str, str]) -> tuple[dict[str, float], tuple[str, ...]]:
    """(weights that float16 cannot hold, mask constants that were clamped). Readers of these weights become islands."""
    outside, clamped = dict[str, float](), list[str]()
    for value in weights(model):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in (F32, BF16) or not value.uses():
            continue
        least, largest = _extremes(tensor)
        release(tensor)
        vanishes = tensor.size == 1 and 0 < largest < SMALLEST
        if tensor.size == 1 and least <= MINUS_INFINITY:
            clamped.append(name_of(value))
            value.const_value = ir.Tensor(np.full(tensor.shape.numpy(), -LARGEST, np.float32), name=value.name)
        elif largest >= LARGEST + 16 or vanishes:  # LARGEST + 16 is where rounding goes to infinity
            readers = [user for user, index in value.uses() if index not in FLOAT32_INPUTS.get(user.op_type, ())]
            new_islands = [name_of(user) for user in readers if name_of(user) not in kept]
            if new_islands:
                outside[name_of(value)] = largest
            kept.update((name, f"its weight {name_of(value)} has {largest:.3g}") for name in new_islands)
    return outside, tuple(clamped)


def _extremes(tensor: ir.TensorProtocol) -> tuple[float, float]:
    """(least number, largest finite absolute value)."""
    array = np.asarray(tensor.numpy(), np.float32)
    if array.size == 0:
        return 0.0, 0.0
    low, high = float(array.min()), float(array.max())
    if np.isfinite(low) and np.isfinite(high):
        return low, max(-low, high)
    return low, float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def _matching(model: ir.Model, patterns: Collection[str]) -> set[str]:
    """The names of the floating-point inputs and outputs that match one of the patterns.

    Raises: UsageError for a pattern that matches none.
    """
    names = [name_of(value) for value in (*model.graph.inputs, *model.graph.outputs) if is_float(value)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"half edge {pattern!r} matches no input or output; there are {choices(pattern, names)}")
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _retype(model: ir.Model, low: ir.DataType, kept: dict[str, str], low_edges: set[str]) -> None:
    """Give every value the type that its node computes in, and add a Cast where a node reads the other type."""
    graph = model.graph
    for value in graph.inputs:
        if is_float(value):
            value.dtype = low if name_of(value) in low_edges else F32
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    nodes = list(graph)
    for node in nodes:
        for value in node.outputs:
            if is_float(value):
                value.dtype = _output_type(node, low, kept)
    for node in nodes:
        dtype = F32 if name_of(node) in kept else low
        if node.op_type == "Cast" and is_float(node.outputs[0]):  # from integers
            node.attributes["to"] = ir.AttrInt64("to", int(dtype.value))
        always_float32 = FLOAT32_INPUTS.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is None or not is_float(value) or node.op_type in ANY_TYPE:
                continue
            target = F32 if index in always_float32 else dtype
            if value.is_initializer() or value.dtype != target:
                node.replace_input_with(index, _as(model, value, target, made))
    for index, value in enumerate(graph.outputs):
        target = low if name_of(value) in low_edges else F32
        if is_float(value) and value.dtype != target:
            graph.outputs[index] = _edge(model, value, target)


def _output_type(node: ir.Node, low: ir.DataType, kept: dict[str, str]) -> ir.DataType:
    """The type of a node's floating-point outputs."""
    if node.op_type in OWN_TYPE:
        return F32
    return F32 if name_of(node) in kept else low


def _as(
    model: ir.Model, value: ir.Value, target: ir.DataType, made: dict[tuple[ir.Value, ir.DataType], ir.Value]
) -> ir.Value:
    """`value` in another type: a converted weight, or the output of its one Cast."""
    if (value, target) in made:
        return made[value, target]
    graph = model.graph
    if value.is_initializer():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype == target:
            return made.setdefault((value, target), value)
        name = names.copy(name_of(value), SHORT[target])
        new = ir.Value(name=name, type=ir.TensorType(target), shape=value.shape)
        new.const_value = converted(tensor, target, name)
        if name not in graph.initializers:
            graph.register_initializer(new)
        return made.setdefault((value, target), graph.initializers[name])
    name = f"{name_of(value)}.{SHORT[target]}"
    cast = behind(model, value)("Cast", [value], name, dtype=target, to=int(target.value))
    return made.setdefault((value, target), cast)


def _name_weights(model: ir.Model, dtype: str) -> None:
    """Give weights back their own names. If a weight exists in two types, the float32 one is called NAME@float32."""
    initializers = model.graph.initializers
    for name in [name for name in initializers if name == names.copy(name, dtype)]:
        plain = names.plain(name)
        if plain in initializers:  # it is the float32 copy
            initializers[plain].name = names.copy(name, SHORT[F32])
        initializers[name].name = plain
    for name in [name for name in initializers if names.plain(name) not in initializers]:
        initializers[name].name = names.plain(name)


def _edge(model: ir.Model, value: ir.Value, target: ir.DataType) -> ir.Value:
    """A graph output in another type than its node computes in. Its Cast takes the name, and `value` gets a new one."""
    name = name_of(value)
    assert value.dtype is not None
    value.name = f"{name}.{SHORT[value.dtype]}"
    return Writer(model, "")(
        "Cast", [value], f"{name}.{SHORT[target]}", dtype=target, output=name, to=int(target.value)
    )
