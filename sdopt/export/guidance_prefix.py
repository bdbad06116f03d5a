"""Guidance runs the UNet twice on one sample. This pass computes only once what does not depend on the prompt.

The halves of classifier-free guidance differ only in the prompt. They compute the same numbers up to the first
cross-attention: in Stable Diffusion 1.5 the first residual block and the first self-attention, at the largest
resolution. The pass gives the sample and the timestep a batch of their own, and repeats a tensor where the prompt is
first used with it:

    before   sample [batch]   timestep [batch]    encoder_hidden_states [batch]
    after    sample [images]  timestep [images]   encoder_hidden_states [batch],  batch = images or 2 * images

The repeats follow one another, in the order of `concatenate([sample, sample])`. Nothing is approximated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sdopt.errors import CheckpointError
from sdopt.graph import names

IMAGES, BATCH = "images", "batch"
SIZES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)  # the types of values that are computed from shapes


def share_guidance_prefix(model: ir.Model, shared: Sequence[str], component: str) -> None:
    """Give the inputs in `shared` the batch dimension "images", and repeat their results where the prompt needs them.

    Raises: CheckpointError if the graph uses its batch in a way that this pass does not know.
    """
    by_name = {value.name: value for value in model.graph.inputs}
    image_inputs = [by_name[name] for name in shared]
    prompt_inputs = [value for value in model.graph.inputs if value not in image_inputs]
    _Pass(component, model.graph, image_inputs, prompt_inputs).run()
    for value in image_inputs:
        value.shape = ir.Shape([IMAGES, *_shape(value)[1:]])


class _Pass:
    """Lets nodes that depend only on the shared inputs run once for each image, and all others once for each prompt."""

    def __init__(
        self, component: str, graph: ir.Graph, image_inputs: list[ir.Value], prompt_inputs: list[ir.Value]
    ) -> None:
        self.component, self.graph, self.image_inputs = component, graph, image_inputs
        self.prompt_nodes = _dependents(prompt_inputs)
        self.image_nodes = _dependents(image_inputs) - self.prompt_nodes
        self.repeated: dict[ir.Value, ir.Value] = {}
        self.resized: dict[ir.Value, ir.Value] = {}
        first = graph[0]
        self.batch = self._insert_count(first, _first_length(prompt_inputs[0]), "batch_of_prompts")
        images = self._insert_count(first, _first_length(image_inputs[0]), "batch_of_images")
        self.repeats = self._insert_count(first, ir.node("Div", [self.batch, images]), "halves")

    def run(self) -> None:
        for node in list(self.graph):
            if node not in self.prompt_nodes or node.op_type == "Shape":
                continue
            for i, value in enumerate(node.inputs):
                if value is not None and (value in self.image_inputs or value.producer() in self.image_nodes):
                    node.replace_input_with(i, self._for_each_prompt(value))
        for i, value in enumerate(self.graph.outputs):
            if value.producer() in self.image_nodes:
                self.graph.outputs[i] = self._for_each_prompt(value)
        self._rename_dimensions()

    def _rename_dimensions(self) -> None:
        """Name the first axis by its length: an engine may rely on equal names being equal lengths."""
        lengths = Counter(str(value.shape[0]) for value in self.repeated if value.shape)
        traced = lengths.most_common(1)[0][0] if lengths else BATCH
        for node in self.graph:
            length = IMAGES if node in self.image_nodes else BATCH
            for value in node.outputs:
                if value.shape is not None and len(value.shape) > 0 and str(value.shape[0]) in (traced, BATCH):
                    value.shape = ir.Shape([length, *value.shape[1:]])

    def _for_each_prompt(self, value: ir.Value) -> ir.Value:
        """What a node of the prompts reads instead of `value`: a size for its own batch, or the repeated tensor."""
        if value.dtype in SIZES:
            return self._resize(value)
        if value not in self.repeated:
            self.repeated[value] = self._repeat(value)
        return self.repeated[value]

    def _repeat(self, value: ir.Value) -> ir.Value:
        """Tile(value, [repeats, 1, 1, ...])"""
        if value.shape is None or len(value.shape) == 0:
            raise CheckpointError(
                f"{self.component}: the graph does not tell which axis of {value.name} is the batch; please report it"
            )
        ones = ir.Value(
            name=names.constant(f"{value.name}/ones"),
            const_value=ir.tensor(np.ones(len(value.shape) - 1, np.int64)),
        )
        self.graph.register_initializer(ones)
        concat = ir.node("Concat", [self.repeats, ones], {"axis": 0})
        counts = concat.outputs[0]
        _describe(counts, f"{value.name}/counts", ir.TensorType(ir.DataType.INT64), ir.Shape([len(value.shape)]))
        tile = ir.node("Tile", [value, counts])
        _describe(tile.outputs[0], f"{value.name}/both", value.type, ir.Shape([BATCH, *value.shape[1:]]))
        self.graph.insert_after(value.producer() or _producer(self.repeats), [concat, tile])
        return tile.outputs[0]

    def _resize(self, value: ir.Value) -> ir.Value:
        """A value that is computed from shapes, as it is for the batch of the prompts. It may be `value` itself."""
        if value not in self.resized:
            node = _producer(value)
            is_shape = node.op_type == "Shape"
            self.resized[value] = self._resize_shape(node, value) if is_shape else self._recompute(node, value)
        return self.resized[value]

    def _recompute(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The result of a copy of `node` that reads resized inputs, if there are any."""
        inputs = [self._resize(i) if i is not None and i.producer() in self.image_nodes else i for i in node.inputs]
        if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            return value
        copy = ir.node(node.op_type, inputs, attributes=dict(node.attributes), domain=node.domain)
        _describe(copy.outputs[0], f"{value.name}/both", value.type, value.shape)
        self.graph.insert_after(node, copy)
        return copy.outputs[0]

    def _resize_shape(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """What a Shape node would give if its input had the batch of the prompts."""
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 1 << 31)
        if start > 0:
            return value  # without the batch
        if end == 1:
            return self.batch
        tensor = node.inputs[0]
        assert tensor is not None
        repeated = self._for_each_prompt(tensor)
        copy = ir.node("Shape", [repeated], dict(node.attributes))
        _describe(copy.outputs[0], f"{value.name}/both", value.type, value.shape)
        self.graph.insert_after(_producer(repeated), copy)
        return copy.outputs[0]

    def _insert_count(self, place: ir.Node, node: ir.Node, name: str) -> ir.Value:
        """Insert `node`, whose result is a list of one integer, before `place`. Returns the result."""
        _describe(node.outputs[0], name, ir.TensorType(ir.DataType.INT64), ir.Shape([1]))
        self.graph.insert_before(place, node)
        return node.outputs[0]


def _first_length(value: ir.Value) -> ir.Node:
    """A node that computes the length of the first axis."""
    return ir.node("Shape", [value], {"start": 0, "end": 1})


def _describe(value: ir.Value, name: str, kind: ir.TypeProtocol | None, shape: ir.Shape | None) -> None:
    value.name, value.type, value.shape = name, kind, shape


def _dependents(values: Sequence[ir.Value]) -> set[ir.Node]:
    """All nodes that depend on the values."""
    dependents: set[ir.Node] = set()
    waiting = [node for value in values for node in value.consumers()]
    while waiting:
        node = waiting.pop()
        if node not in dependents:
            dependents.add(node)
            waiting.extend(user for output in node.outputs for user in output.consumers())
    return dependents


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _shape(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return value.shape
