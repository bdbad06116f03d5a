"""Names of weights: which parameter of the checkpoint an initializer holds, and in which layout.

    conv_in.weight                      the parameter as it is
    mid...attn1.to_q.weight@T           transposed: [in, out], as MatMul reads it
    mid...ff.net.0.proj.bias[0:640]     its rows 0 to 639
    mid...ff.net.0.proj.weight@T[0:640] its rows 0 to 639, transposed: [in, 640]
    conv_in.weight[:,4:9]               all rows, columns 4 to 8
    mid...norm1.weight@float32          a second copy, in float32; the half one beside it has the plain name
    const/val_81                        no parameter: a constant of the graph

    name   = "const/" text [copy]  |  parameter ["@T"] ["[" range {"," range} "]"] [copy]
    range  = ":"  |  start ":" stop                     along one axis of the parameter, whatever the layout
    copy   = "@float32" | "@float16" | "@bfloat16"

The type is no part of a name: a weight stored as float16 has the name that it has in float32. Only where one graph
holds a weight twice, in a half type and in float32, the float32 one says so. All parts of a parameter, put together,
are the parameter; `sdopt.export.weights` proves it for every bundle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from sdopt.bundle.specs import Array
from sdopt.errors import BundleError

CONSTANTS = "const/"
_TYPES = "float32|float16|bfloat16"
_COPY = re.compile(rf"@({_TYPES})$")
_RANGE = r"(?:\d+:\d+|:)"
_NAME = re.compile(
    rf"(?P<parameter>[^@\[\]/]+)(?P<transposed>@T)?(\[(?P<ranges>{_RANGE}(,{_RANGE})*)\])?(@(?P<copy>{_TYPES}))?"
)
Range = tuple[int, int] | None  # (start, stop) along an axis; None: all of it


@dataclass(frozen=True)
class Weight:
    """How an initializer holds a parameter; `ranges` are those of the parameter's axes, the first ones of them."""

    parameter: str
    transposed: bool = False
    ranges: tuple[Range, ...] = ()
    copy: str = ""

    @property
    def name(self) -> str:
        """The name of the initializer."""
        ranges = ",".join(":" if r is None else f"{r[0]}:{r[1]}" for r in self.ranges)
        layout = "@T" if self.transposed else ""
        return f"{self.parameter}{layout}{f'[{ranges}]' if ranges else ''}{f'@{self.copy}' if self.copy else ''}"

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where its numbers are in the parameter."""
        return tuple(slice(None) if r is None else slice(*r) for r in self.ranges)

    def held(self, parameter: Array) -> Array:
        """What the initializer holds of a parameter."""
        part = parameter[self.slices]
        return np.transpose(part) if self.transposed else part

    def undone(self, initializer: Array) -> Array:
        """The part of the parameter that an initializer holds, in the parameter's own layout."""
        return np.transpose(initializer) if self.transposed else initializer

    def cut(self, axis: int, start: int, stop: int, dims: int) -> Weight:
        """A part of this one: from `start` to `stop` along `axis` of the initializer, which has `dims` axes."""
        own = dims - 1 - axis if self.transposed else axis
        ranges = [*self.ranges, *[None] * (own + 1 - len(self.ranges))]
        before = ranges[own]
        offset = before[0] if before else 0
        ranges[own] = (offset + start, offset + stop)
        return replace(self, ranges=tuple(ranges))


def parse(name: str) -> Weight | None:
    """What an initializer holds, by its name; None for a constant."""
    match = None if name.startswith(CONSTANTS) else _NAME.fullmatch(name)
    if match is None:
        return None
    ranges = (match["ranges"] or "").split(",") if match["ranges"] else []
    return Weight(match["parameter"], bool(match["transposed"]), tuple(map(_range, ranges)), match["copy"] or "")


def _range(text: str) -> Range:
    start, _, stop = text.partition(":")
    return (int(start), int(stop)) if start else None


def constant(name: str) -> str:
    """The name of an initializer that is no parameter."""
    return name if name.startswith(CONSTANTS) else f"{CONSTANTS}{name}"


def part(name: str, axis: int, start: int, stop: int, dims: int) -> str:
    """The name of a part of an initializer, also of a constant: along `axis` of its `dims` axes."""
    weight = parse(name)
    return f"{name}/{start}:{stop}" if weight is None else weight.cut(axis, start, stop, dims).name


def plain(name: str) -> str:
    """The name without the type of a copy."""
    return _COPY.sub("", name)


def copy(name: str, dtype: str) -> str:
    """The name of the copy in `dtype`."""
    return f"{plain(name)}@{dtype}"


Parts = Sequence[tuple[Weight, ir.Value]]


def parameters(model: ir.Model) -> dict[str, list[tuple[Weight, ir.Value]]]:
    """The parameters that a graph holds, each with its initializers; second copies are among them."""
    found: dict[str, list[tuple[Weight, ir.Value]]] = {}
    for name, value in model.graph.initializers.items():
        weight = parse(name)
        if weight is not None:
            found.setdefault(weight.parameter, []).append((weight, value))
    return found


def parameter(parts: Parts) -> Array:
    """A parameter in its own layout, put together from its initializers, in the widest type that they are stored in.

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
            own = weight.ranges[axis] if axis < len(weight.ranges) else None
            shape[axis] = max(shape[axis], own[1] if own else length)
    whole = np.empty(shape, np.result_type(*(array for _, array in arrays)))
    if sum(array.size for _, array in arrays) != whole.size:
        raise BundleError(f"{', '.join(weight.name for weight, _ in arrays)}: these are not all of a parameter")
    for weight, array in arrays:
        whole[weight.slices] = array
    return whole


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
