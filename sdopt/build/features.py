"""The inputs of a UNet for the features of T2I-Adapters, in the graph of a step: taken, with a scale, or left out.

    before   value + repeat(feature)                        feature [images, channels, height, width], once a request
    taken    value + repeat(feature_scale * feature)        feature_scale [images, 1], of each call: 0 or 1;
                                                            feature [images, channels, latent_height_over_2, ...]
    left out value

Features stay on the device for the whole request. A call without them has the scale 0.
"""

from __future__ import annotations

import onnx_ir as ir

from sdopt.bundle.joined import FEATURE_SCALE, divided
from sdopt.errors import UsageError
from sdopt.graph import F32, I64, Writer, attribute, drop_unused, name_of, redirect
from sdopt.graph.control import is_feature

LATENT = ("latent_height", "latent_width")


def take_features(model: ir.Model) -> None:
    """Give the UNet the scale of its features, in place. Raises: UsageError if it takes none."""
    given = _features(model)
    if not given:
        raise UsageError("this UNet takes no features of T2I-Adapters; export the checkpoint again with this sdopt")
    assert given[0].shape is not None
    images = given[0].shape[0]
    scale = ir.Value(name=FEATURE_SCALE, type=ir.TensorType(F32), shape=ir.Shape([images, 1]))
    write = Writer(model, f"{FEATURE_SCALE}/", before=next(iter(model.graph)))
    column = write("Reshape", [scale, write.constant("column", [-1, 1, 1, 1], I64)], "column", shape=[images, 1, 1, 1])
    levels = feature_levels(model)
    for value in given:
        assert value.shape is not None
        value.shape = ir.Shape([*value.shape[:2], *(divided(side, 2 ** levels[name_of(value)]) for side in LATENT)])
        _repeat_once_where_halves_are_one(value)
        scaled = write("Mul", [value, column], name_of(value))
        maker = scaled.producer()
        redirect(value, scaled, unless=lambda node, maker=maker: node is maker)
    model.graph.inputs.append(scale)
    drop_unused(model)


def leave_features_out(model: ir.Model) -> None:
    """Take away the inputs for features, and what adds them, in place."""
    given = _features(model)
    for value in given:
        added = _added(value)
        redirect(added.outputs[0], _changed_by(added))
    model.graph.inputs[:] = [value for value in model.graph.inputs if value not in given]
    drop_unused(model)


def feature_levels(model: ir.Model) -> dict[str, int]:
    """How often the latents are halved before each feature is added, by the name of its input."""
    return {name_of(value): halvings(_changed_by(_added(value))) for value in _features(model)}


def _features(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if is_feature(name_of(value))]


def _repeat(given: ir.Value) -> ir.Node:
    """The node that repeats a feature for both halves of guidance."""
    return next(node for node, _ in given.uses() if node.op_type == "Tile")


def _added(given: ir.Value) -> ir.Node:
    """The node that adds a feature to a value of the UNet: first the value, then the feature."""
    return next(node for node, _ in _repeat(given).outputs[0].uses())


def _changed_by(added: ir.Node) -> ir.Value:
    value = added.inputs[0]
    assert value is not None
    return value


def _repeat_once_where_halves_are_one(given: ir.Value) -> None:
    """Where the value has one row for both halves of guidance, the feature is not repeated."""
    value = _changed_by(_added(given))
    assert value.shape is not None
    assert given.shape is not None
    if value.shape[0] == given.shape[0]:
        redirect(_repeat(given).outputs[0], given)


def halvings(value: ir.Value) -> int:
    """How many convolutions with a stride of 2 a value has behind it."""
    nodes, rest = set[ir.Node](), [value]
    while rest:
        maker = rest.pop().producer()
        if maker is not None and maker not in nodes:
            nodes.add(maker)
            rest += [one for one in maker.inputs if one is not None]
    return sum(node.op_type == "Conv" and list(attribute(node, "strides", [1])) == [2, 2] for node in nodes)
