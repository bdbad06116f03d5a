"""Names of weights: which parameter of the checkpoint an initializer holds, and in which layout.

    conv_in.weight                      the parameter as it is
    mid...attn1.to_q.weight@T           transposed: [in, out], as MatMul reads it
    mid...ff.net.0.proj.bias[0:640]     its rows 0 to 639
    mid...ff.net.0.proj.weight@T[0:640] its rows 0 to 639, transposed: [in, 640]
    conv_in.weight[:,4:9]               all rows, columns 4 to 8
    mid...norm1.weight@float32          a second copy, in float32; the half copy has the plain name
    const/val_81                        no parameter: a constant of the graph

    name   = "const/" text [copy]  |  parameter ["@T"] ["[" range {"," range} "]"] [copy]
    range  = ":"  |  start ":" stop                     along one axis of the parameter, whatever the layout
    copy   = "@float32" | "@float16" | "@bfloat16"

The type is not a part of the name: a weight has the same name in float16 and in float32. Only if a graph holds a weight
in both types, the name of the float32 copy ends in @float32. All parts of a parameter together are the parameter;
`sdopt.export.weights` checks it for every bundle.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from sdopt.bundle.specs import Array
from sdopt.dataclass import dataclass

CONSTANTS = "const/"
_TYPES = "float32|float16|bfloat16"
_COPY = re.compile(rf"@({_TYPES})$")
_RANGE = r"(?:\d+:\d+|:)"
_NAME = re.compile(
    rf"(?P<parameter>[^@\[\]/]+)(?P<transposed>@T)?(\[(?P<ranges>{_RANGE}(,{_RANGE})*)\])?(@(?P<copy>{_TYPES}))?"
)
Range = tuple[int, int] | None  # (start, stop) along an axis; None: the whole axis


@dataclass(frozen=True)
class Weight:
    """How an initializer holds a parameter. `ranges` belong to the first axes of the parameter."""

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
        """The part of the parameter that the initializer holds."""
        return tuple(slice(None) if r is None else slice(*r) for r in self.ranges)

    def held(self, parameter: Array) -> Array:
        """The initializer's array, made from the parameter."""
        part = parameter[self.slices]
        return np.transpose(part) if self.transposed else part

    def undone(self, initializer: Array) -> Array:
        """The initializer's array in the parameter's own layout."""
        return np.transpose(initializer) if self.transposed else initializer

    def cut(self, axis: int, start: int, stop: int, dims: int) -> Weight:
        """A part of this weight: `start` to `stop` along `axis` of the initializer, which has `dims` axes."""
        parameter_axis = dims - 1 - axis if self.transposed else axis
        ranges = [*self.ranges, *[None] * (parameter_axis + 1 - len(self.ranges))]
        old = ranges[parameter_axis]
        offset = old[0] if old else 0
        ranges[parameter_axis] = (offset + start, offset + stop)
        return replace(self, ranges=tuple(ranges))


def parse(name: str) -> Weight | None:
    """The weight that an initializer's name stands for; None for a constant."""
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
    """The name of `start` to `stop` along `axis` of an initializer with `dims` axes. It may be a constant."""
    weight = parse(name)
    return f"{name}/{start}:{stop}" if weight is None else weight.cut(axis, start, stop, dims).name


def plain(name: str) -> str:
    """The name without the suffix of a copy."""
    return _COPY.sub("", name)


def copy(name: str, dtype: str) -> str:
    """The name of the copy in `dtype`."""
    return f"{plain(name)}@{dtype}"
