"""Give a UNet inputs for what a ControlNet or a T2I-Adapter adds inside of it. The new graph reads the same weights.

| input                                     | is added to                                                      |
|-------------------------------------------|------------------------------------------------------------------|
| down_block_residual_0 ... _11             | what the upward path takes from the downward path, in the order  |
|                                           | in which the downward path makes it                              |
| mid_block_residual                        | what the middle gives to the upward path                         |
| down_block_feature_0 ... _3               | the last layer of each block of the downward path                |
| mid_block_feature                         | the middle                                                       |

So it is in diffusers: residuals change what the upward path is given, and not what goes on downwards. Features, which
a T2I-Adapter gives, change both. They are the same for both halves of guidance: their batch is "images".
An input has the shape of what it is added to, or lengths of 1 in place of its height and width: zeros of that shape
change nothing, but an engine library may fuse other nodes and round otherwise.
Ref: Zhang et al. 2023, arXiv:2302.05543, section 3.2; Mou et al. 2023, arXiv:2302.08453, section 3.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir

from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.graph import F32, I64, Writer, attribute, load, names, rank, redirect

DOWN, MID = "down_block_residual_", "mid_block_residual"
DOWN_FEATURE, MID_FEATURE = "down_block_feature_", "mid_block_feature"
UPWARD = re.compile(r"up_blocks\.\d+\.resnets\.\d+\.")  # how the names of a residual block's parameters begin


def residual_names(downward: int) -> tuple[str, ...]:
    """The names of so many residuals of the downward path, and of that of the middle."""
    return (*(f"{DOWN}{i}" for i in range(downward)), MID)


def feature_names(places: Sequence[int], downward: int) -> tuple[str, ...]:
    """The names of the features at these places; see `write_controlled_graph`."""
    return tuple(MID_FEATURE if place == downward else f"{DOWN_FEATURE}{i}" for i, place in enumerate(places))


def is_residual(name: str) -> bool:
    """Whether an input of the UNet is a residual."""
    return name.startswith((DOWN, MID))


def is_feature(name: str) -> bool:
    """Whether an input of the UNet is a feature."""
    return name.startswith((DOWN_FEATURE, MID_FEATURE))


def residual(name: str, channels: int) -> TensorSpec:
    """One residual."""
    return TensorSpec(name, "float32", ("batch", channels, *_sides(name)))


def feature(name: str, channels: int) -> TensorSpec:
    """One feature."""
    return TensorSpec(name, "float32", ("images", channels, *_sides(name)))


def residual_sizes(names: Sequence[str], sizes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The lengths of the named dimensions of residuals and features that have these heights and widths."""
    pairs = zip(names, sizes, strict=True)
    return {side: length for name, size in pairs for side, length in zip(_sides(name), size, strict=True)}


def _sides(name: str) -> tuple[str, str]:
    return f"{name}_height", f"{name}_width"


def write_controlled_graph(path: Path, target: Path, places: Sequence[int] = ()) -> None:
    """Write the UNet at `path` with the inputs to `target`, in the same folder, on the same file of weights.

    `places`: to which of the things that have residuals, in their order, each feature is added.
    Raises: CheckpointError if the graph is not built as a UNet of diffusers is.
    """
    model = load(path)
    add_residual_inputs(model, places)
    ir.save(model, target)


def add_residual_inputs(model: ir.Model, places: Sequence[int] = ()) -> None:
    """Add the inputs to `model` in place; see above."""
    joins = _joins(model)
    taken = [(join, 1) for join in reversed(joins)]  # the upward path takes the last first
    taken.append((joins[0], 0))
    features = [(name, taken[place]) for name, place in zip(feature_names(places, len(joins)), places, strict=True)]
    for name, (join, index) in features:
        _add_feature(model, _computed(join, index), name)
    for name, (join, index) in zip(residual_names(len(joins)), taken, strict=True):
        _add(model, join, index, name)
    inputs = {str(value.name): value for value in model.graph.inputs}
    last = [inputs.pop(name) for name, _ in features]  # behind the residuals
    model.graph.inputs[:] = [*inputs.values(), *last]


def _joins(model: ir.Model) -> list[ir.Node]:
    """The nodes that join the upward path with what it takes from the downward path, in the order of their blocks."""
    joins = [node for node in model.graph if node.op_type == "Concat" and _joins_channels(node)]
    blocks = {match[0] for match in map(UPWARD.match, names.parameters(model)) if match}
    if not joins or len(joins) != len(blocks):
        raise CheckpointError(
            f"unet: the upward path takes something in {len(joins)} places, and has {len(blocks)} residual blocks; "
            "please report it"
        )
    return joins


def _joins_channels(node: ir.Node) -> bool:
    inputs = [value for value in node.inputs if value is not None]
    is_image = len(inputs) == 2 and all(value.shape is not None and rank(value) == 4 for value in inputs)
    return is_image and attribute(node, "axis") == 1


def _add(model: ir.Model, join: ir.Node, index: int, name: str) -> None:
    """Add a new input of the graph to an input of a node."""
    value = join.inputs[index]
    assert value is not None
    given = _input(model, residual(name, _channels(value)))
    join.replace_input_with(index, Writer(model, f"{name}/", before=join)("Add", [value, given], "added"))


def _add_feature(model: ir.Model, value: ir.Value, name: str) -> None:
    """Add a new input of the graph to a value, for all that read it. The input is repeated to the value's batch."""
    given = _input(model, feature(name, _channels(value)))
    write = Writer(model, f"{name}/", after=value.producer())
    batch, images = (
        write("Shape", [one], name, dtype=I64, shape=[1], start=0, end=1)
        for one, name in ((value, "batch"), (given, "images"))
    )
    halves = write("Div", [batch, images], "halves")
    ones = write.constant("ones", np.ones(3), I64)
    repeats = write("Concat", [halves, ones], "repeats", shape=[4], axis=0)
    assert value.shape is not None
    assert given.shape is not None
    repeated = write("Tile", [given, repeats], "repeated", shape=[value.shape[0], *given.shape[1:]])
    added = write("Add", [value, repeated], "added")
    readers = (added.producer(), batch.producer())
    redirect(value, added, unless=lambda node: node in readers)


def _computed(join: ir.Node, index: int) -> ir.Value:
    """What a node takes, before it is repeated for both halves of guidance."""
    value = join.inputs[index]
    assert value is not None
    maker = value.producer()
    if maker is not None and maker.op_type == "Tile":
        value = maker.inputs[0]
        assert value is not None
    return value


def _input(model: ir.Model, spec: TensorSpec) -> ir.Value:
    value = ir.Value(name=spec.name, type=ir.TensorType(F32), shape=ir.Shape(spec.shape))
    model.graph.inputs.append(value)
    return value


def _channels(value: ir.Value) -> int:
    assert value.shape is not None
    return cast(int, value.shape[1])
