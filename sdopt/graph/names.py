"""The parameters that a graph holds, by name; `sdopt.bundle.weight_names` has the grammar of the names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sdopt.bundle.specs import Array
from sdopt.bundle.weight_names import CONSTANTS, Weight, constant, copy, parse, part, plain
from sdopt.errors import BundleError

__all__ = ["CONSTANTS", "Weight", "constant", "copy", "parameter", "parameters", "parse", "part", "plain"]

Parts = Sequence[tuple[Weight, ir.Value]]


def parameters(model: ir.Model) -> dict[str, list[tuple[Weight, ir.Value]]]:
    """The parameters that a graph holds, each with its initializers, second copies included."""
    by_parameter: dict[str, list[tuple[Weight, ir.Value]]] = {}
    for name, value in model.graph.initializers.items():
        weight = parse(name)
        if weight is not None:
            by_parameter.setdefault(weight.parameter, []).append((weight, value))
    return by_parameter


def parameter(parts: Parts) -> Array:
    """A parameter in its own layout, joined from its initializers. Its dtype is theirs, or float32 if they differ.

    Raises: BundleError if a part of it is missing.
    """
    arrays = [(weight, weight.undone(_array(value))) for weight, value in parts if not weight.copy]
    if len(arrays) == 1 and not arrays[0][0].ranges:
        return arrays[0][1]
    if not arrays:
        raise BundleError(f"{', '.join(weight.name for weight, _ in parts)}: there are second copies alone")
    shape = list(arrays[0][1].shape)
    for weight, array in arrays:
        for axis, length in enumerate(array.shape):
            part_range = weight.ranges[axis] if axis < len(weight.ranges) else None
            stop = part_range[1] if part_range else length
            shape[axis] = max(shape[axis], stop)
    kinds = {array.dtype for _, array in arrays}  # NumPy has no common type of float16 and bfloat16
    joined = np.empty(shape, kinds.pop() if len(kinds) == 1 else np.float32)
    if sum(array.size for _, array in arrays) != joined.size:
        raise BundleError(f"{', '.join(weight.name for weight, _ in arrays)}: these are not all of a parameter")
    for weight, array in arrays:
        joined[weight.slices] = array
    return joined


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
