"""ONNX graphs and their weights. Weights are read lazily and written one at a time, so 2 GB and more need no memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sdopt.bundle.specs import Array, TensorSpec
from sdopt.errors import BundleError, UsageError
from sdopt.graph import names

F32, F16, BF16, I64, BOOL = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.INT64,
    ir.DataType.BOOL,
)
FLOATS = (F32, F16, BF16)
SHORT = {
    F32: "float32",
    F16: "float16",
    BF16: "bfloat16",
    I64: "int64",
    ir.DataType.INT32: "int32",
    BOOL: "bool",
}
SMALL = 256  # bytes; smaller weights are written into the graph's own file


def load(path: str | os.PathLike[str]) -> ir.Model:
    """The model at `path`. Its external weights stay in their file until they are read.

    Raises: BundleError if it cannot be read; UsageError if it has functions or nested graphs: no pass handles them.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise their own classes for every kind of damage
        raise BundleError(f"{path}: not an ONNX graph that can be read: {error}") from error
    nested = {node.op_type for node in model.graph if any(a.type in _GRAPHS for a in node.attributes.values())}
    if nested or model.functions:
        raise UsageError(f"{path}: it has nested graphs or functions ({', '.join(sorted(nested)) or 'functions'})")
    for i, node in enumerate(model.graph):
        node.name = node.name or f"node_{i}"
    return model


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write the graph to `path` and its weights to `path`.data, one weight in memory at a time.

    Raises: UsageError if the model's own weights are in the file that would be written.
    """
    path = Path(path)
    data = path.with_name(f"{path.name}.data")
    tensors = [value.const_value for value in weights(model)]
    sources = {Path(tensor.path).resolve() for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    if data.resolve() in sources:
        raise UsageError(f"{data}: the graph still reads its weights from this file; choose another name")
    for node in model.graph:
        for value in node.outputs:
            if value.type is None:  # onnx-ir warns about each shape without a type
                value.shape = None
    ir.save(model, path, external_data=data.name, size_threshold_bytes=SMALL)


def specs(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a graph, with the names of its dimensions, as a Component has them."""
    inputs, outputs = (tuple(map(_spec, values)) for values in (model.graph.inputs, model.graph.outputs))
    return inputs, outputs


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(name_of(value), SHORT[value.dtype], shape)


def weights(model: ir.Model) -> list[ir.Value]:
    """All initializers of a graph."""
    return list(model.graph.initializers.values())


def name_of(thing: ir.Value | ir.Node) -> str:
    """The name of a value or node. In a loaded graph each of them has one."""
    return thing.name or ""


def is_float(value: ir.Value | None) -> bool:
    """Whether the value is float32, float16 or bfloat16."""
    return value is not None and value.dtype in FLOATS


def rank(value: ir.Value) -> int:
    """How many dimensions a value has.

    Raises: UsageError if the graph does not say.
    """
    if value.shape is None:
        raise UsageError(f"the graph does not say which shape {value.name} has; export it with sdopt")
    return len(value.shape)


def constant_of(value: ir.Value | None) -> Array | None:
    """The numbers of a constant; None for a computed value and for an input that is left out."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default`."""
    given = node.attributes.get(name)
    return default if given is None else given.value


def converted(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """`tensor` in another float type. It is converted when it is read."""
    if tensor.dtype == dtype:
        return tensor

    def convert() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):
            array = tensor.numpy().astype(dtype.numpy())
        release(tensor)
        return ir.Tensor(array, dtype=dtype, name=name)

    return ir.LazyTensor(convert, dtype, cast(ir.Shape, tensor.shape), name=name)


def release(tensor: ir.TensorProtocol) -> None:
    """Unmap the weights' file of a tensor. No array of it may be in use any more."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


class Writer:
    """Writes nodes into a graph: before the node `before`, after the node `after`, or at the end.

    The names of its nodes and values begin with `prefix`.
    """

    def __init__(
        self, model: ir.Model, prefix: str, *, before: ir.Node | None = None, after: ir.Node | None = None
    ) -> None:
        self._graph, self._prefix, self._before, self._after = model.graph, prefix, before, after

    def __call__(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        shape: Sequence[Any] | ir.Shape | None = None,
        output: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Write a node, and return its output. Dtype and shape are those of the first input unless they are given.

        The output has the node's name unless `output` is given.
        """
        first = inputs[0]
        assert first is not None
        shape = first.shape if shape is None else shape
        value = ir.Value(name=output or self._prefix + name, type=ir.TensorType(dtype or first.dtype or F32))
        value.shape = None if shape is None else ir.Shape(shape)
        self.insert(ir.node(op, inputs, attributes, domain=domain, outputs=[value], name=self._prefix + name))
        return value

    def insert(self, node: ir.Node) -> ir.Node:
        """Insert a node where this writer writes."""
        if self._before is not None:
            self._graph.insert_before(self._before, node)
        elif self._after is not None:
            self._graph.insert_after(self._after, node)
            self._after = node
        else:
            self._graph.append(node)
        return node

    def constant(self, name: str, array: Any, dtype: ir.DataType) -> ir.Value:
        """An initializer that is no parameter. If there is one with this name, it is returned."""
        full = names.constant(self._prefix + name)
        if full in self._graph.initializers:
            return self._graph.initializers[full]
        data = np.asarray(array).astype(dtype.numpy())
        value = ir.Value(name=full, type=ir.TensorType(dtype), shape=ir.Shape(data.shape))
        value.const_value = ir.Tensor(data, dtype=dtype, name=full)
        self._graph.register_initializer(value)
        return value


def behind(model: ir.Model, value: ir.Value) -> Writer:
    """A writer whose nodes can read `value`: after the node that computes it, or at the start for an input."""
    maker = value.producer()
    return Writer(model, "", before=next(iter(model.graph))) if maker is None else Writer(model, "", after=maker)


def redirect(old: ir.Value, new: ir.Value, unless: Callable[[ir.Node], bool] = lambda node: False) -> None:
    """Let the readers of `old` read `new`, without the nodes for which `unless` is true. Graph outputs stay."""
    for user, index in tuple(old.uses()):
        if not unless(user):
            user.replace_input_with(index, new)


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and weights that nothing reads."""
    RemoveUnusedNodesPass()(model)
