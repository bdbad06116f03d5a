"""The weights of a component by the names of its checkpoint, read from a bundle without onnx.

unet = Weights.of(bundle.component("unet", "ort"))
unet.parameters["conv_in.weight"]          # the initializers that hold it
unet.read("conv_in.weight")                # [out, in, kh, kw] in float32, joined from them
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdopt.bundle.disk import read_plain
from sdopt.bundle.files import Component
from sdopt.bundle.format import DENOISERS
from sdopt.bundle.graphs import MAX_GRAPH_BYTES, Initializer, initializers
from sdopt.bundle.specs import Array, Float32
from sdopt.bundle.weight_names import Weight, parse
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16  # ONNX data types
TYPES = {FLOAT: "<f4", FLOAT16: "<f2", BFLOAT16: "<u2"}
PIECE = 1 << 15  # numbers that are read at a time


@dataclass(frozen=True)
class Held:
    """An initializer that holds a parameter or a part of it."""

    weight: Weight
    initializer: Initializer

    @property
    def name(self) -> str:
        return self.initializer.name

    @property
    def is_kernel(self) -> bool:
        """Whether it is the weight of a convolution, [out, in, kh, kw]."""
        return len(self.initializer.shape) == 4 and not self.weight.ranges and not self.weight.transposed

    def rounded(self, numbers: Float32) -> Array:
        """Its numbers in its own type, as they stand in a file; see `rounded`."""
        return rounded(numbers, self.initializer.kind, self.weight.parameter)


def rounded(numbers: Float32, kind: int, parameter: str) -> Array:
    """The numbers of a parameter in another type, as they stand in a file; bfloat16 as its bits.

    Raises: UsageError where float16 cannot hold one.
    """
    if kind == FLOAT:
        return numbers
    if kind == BFLOAT16:  # to nearest, ties to even
        bits = numbers.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    if not np.isfinite(half).all():
        raise UsageError(f"{parameter} would be beyond 65504, and this engine keeps it in float16")
    return half


def takes_overlay(component: str) -> bool:
    """Whether an overlay may change the weights of a bundle's component: the denoiser and the text encoders."""
    return component in DENOISERS or component.startswith("text_encoder")


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters of one graph, each with the initializers that hold it. `content`: the graph's own file."""

    graph: Path
    content: bytes
    parameters: Mapping[str, tuple[Held, ...]]

    @classmethod
    def of(cls, component: Component) -> Weights:
        """Those of a component's graph. Its numbers stay in their file until they are read.

        Raises: OSError, GraphError for a bundle that was changed since it was opened.
        """
        content = read_plain(component.graph, MAX_GRAPH_BYTES)
        return cls(component.graph, content, by_parameter(content))

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter in the checkpoint."""
        return {name: _shape(parts) for name, parts in self.parameters.items()}

    def read(self, parameter: str) -> Float32:
        """A parameter in its own layout and in float32."""
        parts = [part for part in self.parameters[parameter] if not part.weight.copy]
        if len(parts) == 1 and not parts[0].weight.ranges:
            return parts[0].weight.undone(self.stored(parts[0]))
        joined = np.empty(self.shapes[parameter], np.float32)
        for part in parts:
            joined[part.weight.slices] = part.weight.undone(self.stored(part))
        return joined

    def stored(self, part: Held) -> Float32:
        """The numbers of an initializer, in its own layout and in float32."""
        numbers = np.empty(part.initializer.shape, np.float32)
        for _ in self.filled(part, numbers.reshape(-1), PIECE):
            pass
        return numbers

    def first(self, part: Held, count: int) -> Float32:
        """The first numbers of an initializer, in its own order and in float32."""
        numbers = np.empty(math.prod(part.initializer.shape), np.float32)
        next(self.filled(part, numbers, count))
        return numbers[:count]

    def filled(self, part: Held, rows: Float32, step: int) -> Iterator[slice]:
        """Fill `rows`, all numbers of an initializer in its own order, `step` rows at a time; yields which they are.

        A few thousand numbers at a time stay in the processor's cache, from the file to the last sum.
        Raises: OSError for a file that is shorter than when the bundle was opened.
        """
        at = part.initializer
        row_bytes = math.prod(rows.shape[1:]) * np.dtype(TYPES[at.kind]).itemsize
        buffer = bytearray(min(step, len(rows)) * row_bytes)
        with self._opened(at) as file:
            file.seek(at.start)
            for first in range(0, len(rows), step):
                filled = slice(first, min(first + step, len(rows)))
                numbers = memoryview(buffer)[: (filled.stop - first) * row_bytes]
                if file.readinto(numbers) != len(numbers):
                    raise OSError(f"{self.graph.parent / (at.location or self.graph.name)} is too short")
                widen(np.frombuffer(numbers, TYPES[at.kind]).reshape(rows[filled].shape), at.kind, rows[filled])
                yield filled

    def _opened(self, at: Initializer) -> RawIOBase | BytesIO:
        if at.location:
            return (self.graph.parent / at.location).open("rb", buffering=0)
        return BytesIO(self.content)


def widen(stored: Array, kind: int, to: Float32) -> None:
    """Write numbers as they stand in a file into an array of float32; nothing is rounded.

    A float16 has its exponent three bits lower than a float32, and 112 less. NumPy's own conversion takes ten times as
    long, so it has only those blocks in which some number is NaN or infinite.
    """
    bits = to.view(np.int32)
    if kind == FLOAT:
        to[...] = stored
    elif kind == BFLOAT16:
        bits[...] = stored
        bits <<= 16
    elif stored.size and (stored.view(np.int16).max() >= 0x7C00 or stored.view(np.uint16).max() >= 0xFC00):
        to[...] = stored
    else:
        bits[...] = stored.view(np.int16)
        bits <<= 13
        bits &= ~0x70001FFF  # the sign, which stands in four bits now, in its own alone
        to *= np.float32(2.0**112)


def by_parameter(content: bytes) -> dict[str, tuple[Held, ...]]:
    """The parameters of a graph and the initializers that hold them; constants are left out."""
    table: dict[str, list[Held]] = {}
    for initializer in initializers(content):
        weight = parse(initializer.name)
        if weight is not None and initializer.kind in TYPES:
            table.setdefault(weight.parameter, []).append(Held(weight, initializer))
    return {name: tuple(parts) for name, parts in table.items()}


def _shape(parts: tuple[Held, ...]) -> tuple[int, ...]:
    shape: list[int] = []
    for part in parts:
        own = part.initializer.shape[::-1] if part.weight.transposed else part.initializer.shape
        shape = shape or list(own)
        for axis, bounds in enumerate(part.weight.ranges):
            if bounds:
                shape[axis] = max(shape[axis], bounds[1])
    return tuple(shape)


class Overlay(Protocol):
    """Other numbers for some of a bundle's weights. It never changes."""

    @property
    def digest(self) -> str:
        """What all its numbers depend on, in a few digits; empty if it changes nothing."""
        ...

    @property
    def described(self) -> tuple[dict[str, Any], ...]:
        """What it is made of, ready for JSON: name, digest and weights of each file."""
        ...

    def scaled(self, by: float) -> Overlay:
        """The same with every change times `by`."""
        ...

    def key(self, component: str) -> str:
        """What its numbers for a component depend on, in a few digits; empty if it leaves the component as it is."""
        ...

    def changed(self, component: str, weights: Weights) -> Iterator[tuple[str, Float32]]:
        """Each parameter that has other numbers, and these, in the checkpoint's layout."""
        ...

    def merged(self, component: str, weights: Weights, threads: int = 1) -> Iterator[tuple[Held, Float32]]:
        """Each initializer that has other numbers, and these, in its own layout."""
        ...


def patched(content: bytes, numbers: Mapping[str, Array], kinds: Mapping[str, int]) -> bytes:
    """A graph's file with other numbers for initializers that are inside it, and other types for those that are not.

    Both keep their lengths in the file: a type is one byte, and numbers have the type and the shape that they had.
    `numbers`: by name, for initializers in the graph's own file. `kinds`: by name, the type in which an initializer's
    numbers will be given to the library.
    """
    changed = bytearray(content)
    for initializer in initializers(content):
        if initializer.name in numbers:
            changed[initializer.start : initializer.stop] = numbers[initializer.name].tobytes()
        elif initializer.name in kinds:
            changed[initializer.kind_at] = kinds[initializer.name]
    return bytes(changed)
