"""A name says which part of which parameter an initializer holds, and all parts are the parameter."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.errors import BundleError
from sdopt.graph import Writer, names
from sdopt.graph.names import Weight
from tests.graph.common import FLOAT

WEIGHT = "mid_block.attentions.0.proj.weight"


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        (WEIGHT, Weight(WEIGHT)),
        (f"{WEIGHT}@T", Weight(WEIGHT, transposed=True)),
        (f"{WEIGHT}[0:3]", Weight(WEIGHT, ranges=((0, 3),))),
        (f"{WEIGHT}@T[3:6]", Weight(WEIGHT, True, ((3, 6),))),
        (f"{WEIGHT}[:,4:9]", Weight(WEIGHT, ranges=(None, (4, 9)))),
        (f"{WEIGHT}@T[3:6]@float32", Weight(WEIGHT, True, ((3, 6),), "float32")),
        (f"{WEIGHT}@bfloat16", Weight(WEIGHT, copy="bfloat16")),
    ],
)
def test_a_name_is_read_as_it_was_written(name: str, weight: Weight) -> None:
    assert names.parse(name) == weight
    assert weight.name == name


@pytest.mark.parametrize(
    "name",
    ["const/val_81", "const/step/two@float16", "node/weight_0", f"{WEIGHT}@R", f"{WEIGHT}[3]", f"{WEIGHT}[3:]", ""],
)
def test_a_constant_and_what_is_no_name_hold_no_parameter(name: str) -> None:
    assert names.parse(name) is None


def test_a_part_counts_along_the_axes_of_the_parameter_in_every_layout() -> None:
    parameter = np.arange(24).reshape(6, 4)
    turned = names.part(f"{WEIGHT}@T", 1, 2, 6, 2)
    assert turned == f"{WEIGHT}@T[2:6]"
    part_of_part = names.part(turned, 1, 1, 3, 2)
    assert part_of_part == f"{WEIGHT}@T[3:5]"
    columns = names.part(part_of_part, 0, 0, 2, 2)
    assert columns == f"{WEIGHT}@T[3:5,0:2]"
    weight = names.parse(columns)
    assert weight is not None
    np.testing.assert_array_equal(weight.held(parameter), parameter.T[0:2, 3:5])
    np.testing.assert_array_equal(weight.undone(weight.held(parameter)), parameter[weight.slices])
    assert names.part("const/bias", 0, 2, 4, 1) == "const/bias/2:4"


def test_the_type_is_said_of_a_copy_alone() -> None:
    assert names.copy(f"{WEIGHT}@T", "float32") == names.copy(f"{WEIGHT}@T@float16", "float32") == f"{WEIGHT}@T@float32"
    assert names.plain(f"{WEIGHT}@T@bfloat16") == f"{WEIGHT}@T"


def model_of(**arrays: np.ndarray) -> ir.Model:
    model = ir.Model(ir.Graph([], [], nodes=[], name="g", opset_imports={"": 23}), ir_version=10)
    for name, array in arrays.items():
        value = ir.Value(name=name, type=FLOAT, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
        model.graph.register_initializer(value)
    return model


def test_the_parts_of_a_parameter_are_put_together_in_the_widest_type() -> None:
    parameter = np.arange(24, dtype=np.float32).reshape(6, 4) / 3
    first = (parameter[:2].T * 3).astype(np.float16)
    model = model_of(**{"p@T[2:6]": parameter[2:].T, "p@T[0:2]": first, "p@float32": np.zeros((6, 4)), "q": first})
    Writer(model, "")("Identity", [Writer(model, "node/").constant("one", 1, ir.DataType.FLOAT)], "one")
    by_parameter = names.parameters(model)
    assert list(by_parameter) == ["p", "q"]
    together = names.parameter(by_parameter["p"])
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, np.concatenate([parameter[:2] * 3, parameter[2:]]))


def test_a_parameter_of_which_a_part_is_missing_is_refused() -> None:
    parts = names.parameters(model_of(**{"p[0:2]": np.zeros(2), "p[3:6]": np.zeros(3)}))["p"]
    with pytest.raises(BundleError, match=r"p\[0:2\], p\[3:6\]: these are not all"):
        names.parameter(parts)
    with pytest.raises(BundleError, match="second copies alone"):
        names.parameter(names.parameters(model_of(**{"p@float32": np.zeros(2)}))["p"])
