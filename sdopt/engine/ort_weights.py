"""Other weights for a graph that ONNX Runtime is about to load.

Weights outside the graph's file are given as external initializers, which the library takes before it optimises.
(`SessionOptions.add_initializer` comes after: on a graph that is optimised it is ignored without a word, because what
was computed from the old numbers stays.) Those inside the graph's file are written over in a copy of it in memory.

A weight that is kept as float16 and widened by a Cast is given as float32. So nothing is rounded. The type is one byte
of the graph's file.

A graph that the library optimised before has the weights of most convolutions in the order of its kernels, under names
of its own. Such a weight is known by its numbers, and is given in the same order.

Ref: ONNX Runtime 1.26, core/mlas/lib/reorder.cpp, MlasReorderFilterOIHWBiBo and MlasReorderFilterOIHWBo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdopt.bundle.files import Component
from sdopt.bundle.graphs import Initializer, initializers
from sdopt.bundle.specs import Array, Float32
from sdopt.bundle.weights import FLOAT, Held, Overlay, Weights, patched
from sdopt.dataclass import dataclass
from sdopt.engine.cores import usable_cores

MOST_THREADS = 4  # that merge weights: memory is what takes time


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """A graph in memory, the folder of its other weights, and the numbers of those that are given by name."""

    content: bytes
    folder: Path
    external: Mapping[str, Array]


Changes = Mapping[str, tuple[Held, Float32]]  # by the name of the initializer


def changes(component: Component, overlay: Overlay) -> tuple[Weights, Changes]:
    """The weights of a component's graph, and those that an overlay changes, with their numbers."""
    weights = Weights.of(component)
    merged = overlay.merged(component.name, weights, min(usable_cores(), MOST_THREADS))
    return weights, {part.name: (part, numbers) for part, numbers in merged}


def own_weights(weights: Weights, changed: Changes, *, widen: bool) -> OwnWeights:
    """The graph of `weights` with other numbers. `widen`: float16 weights are read by Cast nodes alone."""
    external: dict[str, Array] = {}
    inside: dict[str, Array] = {}
    for name, (part, numbers) in changed.items():
        at = part.initializer
        if at.location and widen:
            external[name] = numbers
        elif at.location:
            external[name] = part.rounded(numbers)
        else:
            inside[name] = part.rounded(numbers)
    kinds = dict.fromkeys(external, FLOAT) if widen else {}
    return OwnWeights(patched(weights.content, inside, kinds), weights.graph.parent, external)


def takes(kept: Weights, own: Weights, changed: Changes) -> Changes | None:
    """The same changes for a graph that the library optimised before; None if it holds one of them in another form.

    `own`: the weights of the graph that it was made from. In the kept graph a float16 weight has become what its Cast
    gave, under that name, and the weight of a convolution has become blocks.
    """
    names = {initializer.name for initializer in initializers(own.content)}
    there = {initializer.name: initializer for initializer in initializers(kept.content)}
    renamed = [initializer for name, initializer in there.items() if name not in names]
    taken: dict[str, tuple[Held, Float32]] = {}
    for name, (part, numbers) in changed.items():
        initializer = there.get(name) or there.get(f"{name}/float32")
        if initializer is None and part.is_kernel:
            initializer, numbers = _in_blocks(kept, own, part, numbers, renamed) or (None, numbers)
        if initializer is None or initializer.kind != FLOAT or initializer.shape != numbers.shape:
            return None
        if initializer.name in taken:
            return None
        taken[initializer.name] = Held(part.weight, initializer), numbers
    return taken


@dataclass(frozen=True)
class Blocks:
    """An order of a convolution's weight, [out, in, kh, kw], that kernels read: in blocks of `size` outputs.

    In memory it is [out/size, in/size, kh, kw, size of in, size of out], or [out/size, in, kh, kw, size] without
    blocks of inputs. Outputs are filled up with zeros. The shape that the graph has keeps four axes.
    """

    size: int
    of_inputs: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of such a weight; None where its inputs are no whole number of blocks."""
        return None if self.of_inputs and shape[1] % self.size else (shape[0] + -shape[0] % self.size, *shape[1:])

    def ordered(self, weight: Float32) -> Float32:
        """The weight in this order."""
        size, (outputs, inputs, *kernel) = self.size, weight.shape
        if outputs % size:
            weight = np.concatenate((weight, np.zeros((-outputs % size, inputs, *kernel), np.float32)))
        if self.of_inputs:
            blocks = np.transpose(weight.reshape(-1, size, inputs // size, size, *kernel), (0, 2, 4, 5, 3, 1))
        else:
            blocks = np.transpose(weight.reshape(-1, size, inputs, *kernel), (0, 2, 3, 4, 1))
        return np.reshape(np.ascontiguousarray(blocks), weight.shape)


ORDERS = [Blocks(size, of_inputs) for of_inputs in (True, False) for size in (16, 8, 4)]  # 16: AVX-512; 8: AVX


def _in_blocks(
    kept: Weights, own: Weights, part: Held, numbers: Float32, renamed: Sequence[Initializer]
) -> tuple[Initializer, Float32] | None:
    """The initializer of the kept graph that is a convolution's weight in blocks, and other numbers in that order.

    It is the one whose numbers are those of the weight. None where there is none, or more than one, e.g. because two
    weights are all zeros.
    """
    base = own.stored(part)
    matching: dict[str, tuple[Initializer, Blocks]] = {}  # of a 1x1 kernel, two orders are the same
    for blocks in ORDERS:
        shape = blocks.shape(base.shape)
        alike = [i for i in renamed if i.shape == shape and i.kind == FLOAT] if shape else []
        begin = blocks.ordered(base[: blocks.size]).reshape(-1) if alike else base
        for initializer in alike:
            held = Held(part.weight, initializer)
            if (kept.first(held, begin.size) == begin).all() and (kept.stored(held) == blocks.ordered(base)).all():
                matching[initializer.name] = initializer, blocks
    if len(matching) != 1:
        return None
    ((initializer, blocks),) = matching.values()
    return initializer, blocks.ordered(numbers)
