"""Weights by name: every parameter of a component is in its graph under the checkpoint's name. This is proven here.

While torch's exporter optimizes a graph, the parameters are its inputs. So the exporter neither folds one into another
tensor nor merges two that are equal. Afterwards each becomes an initializer under its own name. If a MatMul reads it
transposed, it is stored transposed. All other stored numbers are constants (`sdopt.graph.names` has the grammar).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from sdopt import graph
from sdopt.bundle.specs import Array
from sdopt.errors import CheckpointError
from sdopt.export.file_weights import FileWeights
from sdopt.export.part import Part
from sdopt.graph import names


def parameters(part: Part) -> dict[str, str]:
    """The module's name of each parameter -> its name in the checkpoint."""
    in_module = [name for name, _ in part.module.named_parameters()]
    return {name: part.prefix + name.removeprefix("model.") for name in in_module}


@contextmanager
def as_inputs(model: ir.Model, part: Part) -> Generator[None]:
    """A context in which the parameters are inputs of the graph. Afterwards they are its initializers, by name.

    Raises: CheckpointError if a parameter is not used.
    """
    checkpoint_names, initializers = parameters(part), model.graph.initializers
    in_graph = {name: value for name, value in initializers.items() if name in checkpoint_names}
    tensors = {value: _numbers(part, checkpoint_names[name], value.const_value) for name, value in in_graph.items()}
    first = len(model.graph.inputs)
    for value in tensors:
        del initializers[graph.name_of(value)]
        value.const_value = None
        model.graph.inputs.append(value)
    yield
    del model.graph.inputs[first:]
    for value in list(initializers.values()):
        value.name = names.constant(graph.name_of(value))
    for value, tensor in tensors.items():
        value.name = checkpoint_names[graph.name_of(value)]
        value.const_value = tensor
        model.graph.register_initializer(value)
        _transpose(model, value)
    graph.drop_unused(model)
    _require_all(part, names.parameters(model))


def _numbers(part: Part, name: str, traced: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    """The numbers of a parameter: those that were traced, or those in its file, which are read when they are needed."""
    if part.weights is None or traced is None:
        return traced
    read = partial(_read, part.weights, name)
    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(traced.shape.numpy()), name=name)


def _read(stored: FileWeights, name: str) -> ir.TensorProtocol:
    return ir.tensor(stored[name].numpy())


def _transpose(model: ir.Model, value: ir.Value) -> None:
    """Store a matrix transposed if nodes read it transposed, in place of their Transpose nodes."""
    for node in [node for node, _ in value.uses() if node.op_type == "Transpose"]:
        tensor = value.const_value
        if tensor is None or tuple(graph.attribute(node, "perm", ())) != (1, 0):
            continue
        name = names.Weight(graph.name_of(value), transposed=True).name
        if name not in model.graph.initializers:
            shape = ir.Shape(tensor.shape.numpy()[::-1])
            new = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype))
            new.const_value = ir.LazyTensor(partial(_transposed, tensor), tensor.dtype, shape, name=name)
            model.graph.register_initializer(new)
        graph.redirect(node.outputs[0], model.graph.initializers[name])
        model.graph.remove(node, safe=True)


def _transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The transposed tensor. It is computed when it is read, because the exporter keeps the graph in memory."""
    return ir.tensor(np.transpose(tensor.numpy()))


def _require_all(part: Part, in_graph: Mapping[str, object]) -> None:
    """Raises: CheckpointError that names the parameters that are not in the graph."""
    missing = [name for name in parameters(part).values() if name not in in_graph and not unused(part, name)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{part.name}: its graph does not use {', '.join(missing[:5])}{more}; either the model does not compute "
            "with them, or the export lost them; please report it"
        )


def unused(part: Part, name: str) -> str:
    """Why the component does not read a parameter; empty if it must."""
    return next((reason for start, reason in part.unused.items() if name.startswith(start)), "")


def prove(part: Part, path: Path) -> int:
    """Compare every parameter bit for bit with its values in the written graph. Returns the number of parameters.

    Raises: CheckpointError that names a parameter that is missing, unknown or different.
    """
    in_graph = names.parameters(graph.load(path))
    _require_all(part, in_graph)
    checkpoint_names = parameters(part)
    for name in in_graph.keys() - set(checkpoint_names.values()):
        raise CheckpointError(f"{path.name}: {name} is no parameter of the {part.name}")
    for module_name, tensor in part.module.named_parameters():
        name = checkpoint_names[module_name]
        if name not in in_graph:
            continue
        numbers = tensor.detach() if part.weights is None else part.weights.stored(name)
        if not _is(names.parameter(in_graph[name]), numbers):
            raise CheckpointError(f"{path.name}: {name} is not what the checkpoint holds; please report it")
        for _, value in in_graph[name]:
            if value.const_value is not None:
                graph.release(value.const_value)
    return len(in_graph)


def _is(stored: Array, parameter: torch.Tensor) -> bool:
    return _has_bits(stored, parameter) or _equal(stored, parameter.float().numpy())


def _has_bits(stored: Array, parameter: torch.Tensor) -> bool:
    """Whether both are of one type, and have the same bits: the quick answer."""
    if stored.dtype.name != str(parameter.dtype).removeprefix("torch."):
        return False
    numpy_bits, torch_bits = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}[stored.dtype.itemsize]
    return np.array_equal(stored.view(numpy_bits), parameter.view(torch_bits).numpy())


def _equal(stored: Array, parameter: Array) -> bool:
    """Whether both have the same bits in the parameter's dtype. All NaN count as equal."""
    with np.errstate(invalid="ignore"):
        wide = stored.astype(parameter.dtype, copy=False)
    same_signs = np.array_equal(np.signbit(wide), np.signbit(parameter))
    return same_signs and np.array_equal(wide, parameter, equal_nan=True)
