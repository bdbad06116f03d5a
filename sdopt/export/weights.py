"""Weights by name: every parameter of a component is found in its graph under the checkpoint's name, and proven there.

While torch's exporter optimizes a graph, the parameters are inputs of it: it neither folds one into another tensor nor
merges two that are equal. Afterwards each becomes an initializer under its own name, transposed where a MatMul reads
it so, and everything else that holds numbers is a constant (`sdopt.graph.names` has the grammar).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.bundle.specs import Array
from sdopt.errors import CheckpointError
from sdopt.export.components import Part
from sdopt.graph import names


def parameters(part: Part) -> dict[str, str]:
    """The module's name of each parameter -> its name in the checkpoint."""
    found = [name for name, _ in part.module.named_parameters()]
    return {name: part.prefix + name.removeprefix("model.") for name in found}


@contextmanager
def as_inputs(model: ir.Model, part: Part) -> Generator[None]:
    """While it lasts, the parameters are inputs; then they are initializers, by name.

    Raises: CheckpointError if a parameter is not used.
    """
    own, initializers = parameters(part), model.graph.initializers
    tensors = {value: value.const_value for name, value in initializers.items() if name in own}
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
        value.name = own[graph.name_of(value)]
        value.const_value = tensor
        model.graph.register_initializer(value)
        _transpose(model, value)
    graph.drop_unused(model)
    _require_all(part, names.parameters(model))


def _transpose(model: ir.Model, value: ir.Value) -> None:
    """Store a matrix as its readers read it: transposed."""
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
    """When it is asked for: what torch's exporter keeps of a graph must not keep the weights in memory."""
    return ir.tensor(np.transpose(tensor.numpy()))


def _require_all(part: Part, there: Mapping[str, object]) -> None:
    """Raises: CheckpointError that names the parameters without a place."""
    missing = [name for name in parameters(part).values() if name not in there and not unused(part, name)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{part.name}: its graph does not use {', '.join(missing[:5])}{more}; either the "
            "model does not compute with them, so that they are none of its parameters, or the export lost them; "
            "please report it"
        )


def unused(part: Part, name: str) -> str:
    """Why a component is known not to read a parameter; empty if it has to."""
    return next((reason for start, reason in part.unused.items() if name.startswith(start)), "")


def prove(part: Part, path: Path) -> int:
    """Compare every parameter with what the written graph holds of it, bit for bit; how many there are.

    Raises: CheckpointError naming the first that is missing, or another.
    """
    model = graph.load(path)
    there = names.parameters(model)
    _require_all(part, there)
    own = parameters(part)
    for name in there.keys() - set(own.values()):
        raise CheckpointError(f"{path.name}: {name} is no parameter of the {part.name}")
    for module_name, tensor in part.module.named_parameters():
        name = own[module_name]
        if name in there and not _equal(names.parameter(there[name]), tensor.detach().numpy()):
            raise CheckpointError(f"{path.name}: {name} is not what the checkpoint holds; please report it")
        for _, value in there.get(name, ()):
            if value.const_value is not None:
                graph.release(value.const_value)
    return len(there)


def _equal(stored: Array, parameter: Array) -> bool:
    """Whether both are the same bits, once in the parameter's type; which NaN it is does not count."""
    with np.errstate(invalid="ignore"):
        wide = stored.astype(parameter.dtype, copy=False)
    same_signs = np.array_equal(np.signbit(wide), np.signbit(parameter))
    return same_signs and np.array_equal(wide, parameter, equal_nan=True)
