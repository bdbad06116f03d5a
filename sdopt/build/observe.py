"""What the layers of a graph multiply, seen while it computes: the statistics that int8 needs.

An `Observer` is an engine. It computes a component in float32, as any engine does, and looks at the input of every
layer that can be quantized: how large it gets, in each channel, and a few of its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.build.int8 import layers_of
from sdopt.build.simulate import session
from sdopt.bundle.files import Component
from sdopt.bundle.specs import Array, Float32, check_inputs
from sdopt.graph import attribute, name_of

ROWS = 256  # of each layer, in all calls together


@dataclass(eq=False)
class Seen:
    """The input of one layer in all calls so far.

    `highest`, `lowest` [channels]: the values between which each of them is. `rows` [some, numbers of an output]: what
    meets the weight at places chosen at random. `judging`: the same of calls that are held out. `products`:
    multiply-adds of the layer in one call.
    """

    highest: Float32
    lowest: Float32
    rows: list[Float32] = field(default_factory=list[Float32])
    judging: list[Float32] = field(default_factory=list[Float32])
    products: int = 0


@dataclass(frozen=True, eq=False)
class Patch:
    """The window of a convolution. `pads`: rows above, columns on the left, rows below, columns on the right."""

    size: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]

    @staticmethod
    def of(node: ir.Node, weight: Sequence[int]) -> Patch:
        strides = tuple(int(n) for n in attribute(node, "strides", (1, 1)))
        pads = tuple(int(n) for n in attribute(node, "pads", (0, 0, 0, 0)))
        return Patch((weight[2], weight[3]), (strides[0], strides[1]), (pads[0], pads[1], pads[2], pads[3]))


@dataclass(frozen=True, eq=False)
class _Watched:
    weight: str
    input: str
    shape: tuple[int, ...]  # of its weight
    patch: Patch | None


class Observer:
    """A component as an engine that looks at its layers. `seed` chooses the rows.

    While it `is_judging`, calls are held out: only rows are kept of them.
    """

    def __init__(self, component: Component, folder: Path, calls: int, seed: int = 0) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self.seen: dict[str, Seen] = {}
        self.is_judging, self.calls = False, 0
        self._rows = max(1, ROWS // max(1, calls))
        self._seed = seed
        model = graph.load(component.graph)
        self._watched: list[_Watched] = []
        values: dict[str, ir.Value] = {}
        for layer in layers_of(model):
            patch = Patch.of(layer.node, layer.shape) if layer.is_conv else None
            self._watched.append(_Watched(layer.weight, name_of(layer.input), layer.shape, patch))
            values[name_of(layer.input)] = layer.input
        model.graph.outputs.extend(v for v in values.values() if not v.is_graph_output() and v.producer() is not None)
        path = folder / f"{component.name}-observed.onnx"
        graph.save(model, path)
        self._inner = tuple(values)
        self._session: Any = session(path, optimize=True)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        check_inputs(self.name, self.inputs, arrays)
        own = [spec.name for spec in self.outputs]
        wanted = [*own, *(name for name in self._inner if name not in arrays)]
        results: dict[str, Array] = dict(zip(wanted, self._session.run(wanted, dict(arrays)), strict=True))
        for watched in self._watched:
            self._look(watched, results.get(watched.input, arrays.get(watched.input)))
        self.calls += 1
        return {name: results[name] for name in own}

    def _look(self, watched: _Watched, array: Array | None) -> None:
        assert array is not None
        axis = 1 if watched.patch else array.ndim - 1
        others = tuple(k for k in range(array.ndim) if k != axis)
        highest, lowest = array.max(others), array.min(others)
        seen = self.seen.setdefault(watched.weight, Seen(highest, lowest))
        if not self.is_judging:
            seen.highest, seen.lowest = np.maximum(seen.highest, highest), np.minimum(seen.lowest, lowest)
        kept = seen.judging if self.is_judging else seen.rows
        digest = hashlib.sha256(f"{self._seed} {self.calls} {watched.weight}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        if watched.patch is None:
            channels = array.reshape(-1, array.shape[-1])
            places = len(channels)
            kept.append(channels[random.integers(0, places, self._rows)].astype(np.float32))
            per_place = watched.shape[0] * watched.shape[1]
        else:
            rows, places = patches(array, watched.patch, self._rows, random)
            kept.append(rows)
            per_place = int(np.prod(watched.shape))
        seen.products = places * per_place

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def patches(array: Array, patch: Patch, count: int, random: np.random.Generator) -> tuple[Float32, int]:
    """(`count` windows of a convolution's input [images, channels, height, width], how many windows there are).

    A window is a row of channels * height * width numbers, in the order of the weight.
    """
    top, left, bottom, right = patch.pads
    padded = np.pad(array, ((0, 0), (0, 0), (top, bottom), (left, right)))
    high = (padded.shape[2] - patch.size[0]) // patch.strides[0] + 1
    wide = (padded.shape[3] - patch.size[1]) // patch.strides[1] + 1
    rows = np.empty((count, array.shape[1] * patch.size[0] * patch.size[1]), np.float32)
    for row, place in zip(rows, random.integers(0, len(array) * high * wide, count), strict=True):
        image, rest = divmod(int(place), high * wide)
        y, x = (index * stride for index, stride in zip(divmod(rest, wide), patch.strides, strict=True))
        row[:] = padded[image, :, y : y + patch.size[0], x : x + patch.size[1]].reshape(-1)
    return rows, len(array) * high * wide
