"""Guidance runs the UNet twice on one sample; what comes before the prompt needs to be computed only once.

The halves of classifier-free guidance differ in the prompt alone. Until the first cross-attention they compute the same
numbers: in Stable Diffusion 1.5 the first residual block and the first self-attention, at the largest resolution. This
pass gives the sample and the timestep a batch of their own and repeats a tensor where it first meets the prompt:

    before   sample [batch]   timestep [batch]    encoder_hidden_states [batch]
    after    sample [images]  timestep [images]   encoder_hidden_states [batch],  batch = images or 2 * images

The repeats stand one after another, as `concatenate([sample, sample])` puts them. Nothing is approximated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from sdopt.errors import CheckpointError
from sdopt.graph import names

IMAGES, _BATCH = "images", "batch"
T = TypeVar("T")


def share_halves(model: ir.Model, shared: Sequence[str]) -> None:
    """Give the inputs named in `shared` the batch dimension "images", and repeat what is made of them where it must be.

    Raises: CheckpointError if the graph uses its batch in a way that this pass does not know.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    ours = [inputs[name] for name in shared]
    others = [value for value in model.graph.inputs if value not in ours]
    _Halves(model, ours, others).run()
    for value in ours:
        assert value.shape is not None
        value.shape = ir.Shape([IMAGES, *value.shape[1:]])


class _Halves:
    """The nodes of a graph by what they depend on: only the shared inputs, or the prompt too."""

    def __init__(self, model: ir.Model, shared: list[ir.Value], others: list[ir.Value]) -> None:
        self.graph, self.shared = model.graph, shared
        self.prompted = _reached(others)
        self.once = _reached(shared) - self.prompted
        self.anchor = others[0]
        self.repeated: dict[ir.Value, ir.Value] = {}
        self.sizes: dict[ir.Value, ir.Value] = {}
        self.batch: ir.Value | None = None
        self.repeats: ir.Value | None = None

    def run(self) -> None:
        self._measure()
        for node in list(self.graph):
            if node not in self.prompted or node.op_type == "Shape":
                continue
            for i, value in enumerate(node.inputs):
                if value is not None and (value in self.shared or value.producer() in self.once):
                    node.replace_input_with(i, self._for_both(value))
        for i, value in enumerate(self.graph.outputs):
            if value.producer() in self.once:
                self.graph.outputs[i] = self._for_both(value)
        self._rename()

    def _rename(self) -> None:
        """Two names for what was one length: an engine may take equal names for equal lengths."""
        lengths = Counter(str(v.shape[0]) for v in self.repeated if v.shape)
        traced = lengths.most_common(1)[0][0] if lengths else _BATCH
        for node in self.graph:
            for value in node.outputs:
                if value.shape is not None and len(value.shape) and str(value.shape[0]) in (traced, _BATCH):
                    value.shape = ir.Shape([IMAGES if node in self.once else _BATCH, *value.shape[1:]])

    def _measure(self) -> None:
        """batch = length of the prompt's first axis; repeats = [batch / images]."""
        first = self.graph[0]

        def length(of: ir.Value, name: str) -> ir.Value:
            node = ir.node("Shape", [of], {"start": 0, "end": 1})
            return self._before(first, node, name, ir.DataType.INT64, [1])

        self.batch = length(self.anchor, "batch_of_prompts")
        images = length(self.shared[0], "batch_of_images")
        ratio = ir.node("Div", [self.batch, images])
        self.repeats = self._before(first, ratio, "halves", ir.DataType.INT64, [1])

    def _for_both(self, value: ir.Value) -> ir.Value:
        """What the prompted part takes for `value`: a size with its own batch, or the tensor repeated."""
        if value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
            return self._resized(value)
        if value not in self.repeated:
            self.repeated[value] = self._tiled(value)
        return self.repeated[value]

    def _tiled(self, value: ir.Value) -> ir.Value:
        if value.shape is None or len(value.shape) == 0:
            raise CheckpointError(f"unet: the graph does not tell which axis of {value.name} is the batch")
        producer = value.producer()
        place = self.graph[0] if producer is None else producer
        ones = ir.tensor(np.ones(len(value.shape) - 1, np.int64))
        rest = ir.Value(name=names.constant(f"{value.name}/ones"), const_value=ones)
        self.graph.register_initializer(rest)
        counts = ir.node("Concat", [_known(self.repeats), rest], {"axis": 0})
        tile = ir.node("Tile", [value, counts.outputs[0]])
        counts.outputs[0].name, tile.outputs[0].name = f"{value.name}/counts", f"{value.name}/both"
        counts.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        counts.outputs[0].shape = ir.Shape([len(value.shape)])
        tile.outputs[0].type, tile.outputs[0].shape = value.type, ir.Shape([_BATCH, *value.shape[1:]])
        if producer is None:
            self.graph.insert_after(_known(_known(self.repeats).producer()), [counts, tile])
        else:
            self.graph.insert_after(place, [counts, tile])
        return tile.outputs[0]

    def _resized(self, value: ir.Value) -> ir.Value:
        """An integer computed from shapes, computed again with the prompt's batch if the batch is part of it."""
        if value in self.sizes:
            return self.sizes[value]
        node = _known(value.producer())
        made = value
        if node.op_type == "Shape":
            made = self._length(node, value)
        else:
            inputs = [v if v is None or v.producer() not in self.once else self._resized(v) for v in node.inputs]
            if any(new is not old for new, old in zip(inputs, node.inputs, strict=True)):
                copy = ir.node(node.op_type, inputs, attributes=dict(node.attributes), domain=node.domain)
                copy.outputs[0].name = f"{value.name}/both"
                copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
                self.graph.insert_after(node, copy)
                made = copy.outputs[0]
        self.sizes[value] = made
        return made

    def _length(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """What a Shape says of a tensor that both halves share, as the prompted part has to read it."""
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 1 << 31)
        if start > 0:
            return value  # not its batch
        if end == 1:
            return _known(self.batch)
        copy = ir.node("Shape", [self._for_both(_known(node.inputs[0]))], dict(node.attributes))
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = (
            f"{value.name}/both",
            value.type,
            value.shape,
        )
        self.graph.insert_after(_known(_known(copy.inputs[0]).producer()), copy)
        return copy.outputs[0]

    def _before(self, place: ir.Node, node: ir.Node, name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        value = node.outputs[0]
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.insert_before(place, node)
        return value


def _reached(values: Sequence[ir.Value]) -> set[ir.Node]:
    """All nodes that the values lead to."""
    found: set[ir.Node] = set()
    waiting = [node for value in values for node in value.consumers()]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(user for output in node.outputs for user in output.consumers())
    return found


def _known(found: T | None) -> T:
    assert found is not None
    return found
