"""Types of a network that is not strongly typed, on layers as TensorRT 8.6's bindings show them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from sdopt import graph
from sdopt.build.checks import refuse_lost_islands
from sdopt.build.fuse_step import fuse_step
from sdopt.build.half import half
from sdopt.build.lower import lower
from sdopt.build.trt_types import half_products, inspected, keep_types, layer_types, lost_islands, types_of
from sdopt.errors import BackendError
from tests.build.test_half import UNET

DataType = Enum("DataType", ["FLOAT", "HALF", "INT32", "BOOL"])
KINDS = {"Constant": "CONSTANT", "Shape": "SHAPE", "Cast": "CAST", "LayerNormalization": "NORMALIZATION"}


@dataclass
class Layer:
    """One layer; `precision` and the types that were set are what the test reads."""

    kind: str
    tensors: list[Any]
    precision: Any = None
    set_types: dict[int, Any] = field(default_factory=dict)

    @property
    def type(self) -> Any:
        return SimpleNamespace(name=self.kind)

    @property
    def num_outputs(self) -> int:
        return len(self.tensors)

    def get_output(self, k: int) -> Any:
        return self.tensors[k]

    def set_output_type(self, k: int, dtype: Any) -> None:
        self.set_types[k] = dtype


class Network:
    """What `keep_types` asks of a network."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers, self.num_layers = layers, len(layers)

    def get_layer(self, i: int) -> Layer:
        return self.layers[i]


def tensor(name: str, dtype: str = "FLOAT", shape: bool = False) -> Any:
    return SimpleNamespace(name=name, dtype=DataType[dtype], is_shape_tensor=shape)


def parsed() -> tuple[Network, dict[str, str], dict[str, Layer]]:
    """The emoji step as one layer for each node, and an unnamed one before it, as parsers make them."""
    model = fuse_step(graph.load(UNET), rescale=True)
    half(model)
    lower(model)
    layers: list[Layer] = []
    for node in model.graph:
        outputs = [tensor(v.name, "FLOAT" if graph.is_float(v) else "INT32")
                 for v in node.outputs]  # fmt: skip
        if graph.is_float(node.outputs[0]):
            layers.append(Layer("SHUFFLE", [tensor(f"(Unnamed Layer* {len(layers)}) [Shuffle]_output")]))
        layers.append(Layer(KINDS.get(node.op_type, "ELEMENTWISE"), outputs))
    named = {layer.tensors[0].name: layer for layer in layers}
    return Network(layers), types_of(model), named


def test_every_layer_gets_the_type_that_the_graph_gives_its_tensor() -> None:
    network, types, layers = parsed()
    assert keep_types(network, types) > 500
    for name in ("sin", "cos", "step/guided", "next_sample", "step/rescaled"):
        assert layers[name].precision is DataType.FLOAT
        assert set(layers[name].set_types.values()) == {DataType.FLOAT}
    halves = [layer for name, layer in layers.items() if types.get(name) == "float16" and layer.kind == "ELEMENTWISE"]
    assert len(halves) > 200
    assert {layer.precision for layer in halves} == {DataType.HALF}


def test_an_unnamed_layer_belongs_to_the_node_behind_it() -> None:
    network, types, layers = parsed()
    keep_types(network, types)
    index = network.layers.index(layers["sin"])
    assert network.layers[index - 1].precision is DataType.FLOAT
    index = network.layers.index(next(layer for name, layer in layers.items() if types.get(name) == "float16"
                                      and layer.kind == "ELEMENTWISE"))  # fmt: skip
    assert network.layers[index - 1].precision is DataType.HALF


def test_whole_numbers_constants_shapes_and_casts_are_left_alone() -> None:
    layers = [
        Layer("CONSTANT", [tensor("a")]), Layer("SHAPE", [tensor("b", "INT32")]), Layer("CAST", [tensor("c")]),
        Layer("ELEMENTWISE", [tensor("d", "BOOL")]), Layer("ELEMENTWISE", [tensor("e", shape=True)]),
        Layer("TOPK", [tensor("f"), tensor("g", "INT32")]), Layer("NORMALIZATION", [tensor("h")]),
    ]  # fmt: skip
    types = dict.fromkeys("abcdefgh", "float16")
    assert keep_types(Network(layers), types) == 2
    assert [layer.set_types for layer in layers[:5]] == [{}] * 5
    assert layers[5].set_types == {0: DataType.HALF}
    assert layers[6].precision is None  # it computes in float32 unless it is told otherwise
    assert layers[6].set_types == {0: DataType.HALF}


def inspector(**tensors: str) -> str:
    outputs = [{"Name": name, "Format/Datatype": text} for name, text in tensors.items()]
    return json.dumps({"Layers": ["a name alone", {"Name": "x", "Outputs": outputs}], "Bindings": []})


def test_an_island_that_the_library_made_half_is_an_error() -> None:
    types = {"sin": "float32", "cos": "float32", "conv": "float16", "hidden": "float32"}
    good = inspector(sin="Row major linear FP32", cos="Float", conv="Half")
    assert lost_islands(good, types) == ([], 2)
    assert refuse_lost_islands("unet_step", good, types) == 2
    bad = inspector(sin="Channel major FP16 format where channel % 8 == 0", cos="Float")
    with pytest.raises(
        BackendError, match=r"unet_step: sin must be float32, and the library made them half.*--precisio"
    ):
        refuse_lost_islands("unet_step", bad, types)
    assert lost_islands("", types) == ([], 0)


def test_the_inspectors_types_are_counted() -> None:
    layers = inspector(x="Row major linear FP32", Half="Half", y="Channel major FP16 format", z="BFloat16")
    assert inspected(layers) == {"HALF": 2, "FLOAT": 1, "BF16": 1}
    assert inspected("") == {}


def test_layers_and_products_are_counted() -> None:
    network = Network([Layer("CONVOLUTION", [tensor("a", "HALF")]), Layer("SHUFFLE", [tensor("b")])])
    assert layer_types(network) == {"HALF": 1, "FLOAT": 1}
    model = graph.load(UNET)
    assert half_products(model) == 0
    half(model)
    assert half_products(model) == 140
