"""Weights in int8: the pass on graphs, what is built of T5, and what runs."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

import sdopt
from sdopt.build import int8_weights
from sdopt.build.int8_weights import round_weights
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.files import Bundle
from sdopt.cli.main import main
from sdopt.engine.store import stored, usable
from sdopt.graph import constant_of
from sdopt.metrics import psnr
from tests.build.common import checked, outputs
from tests.build.test_int8 import dense, model_of
from tests.conftest import EMOJI_BUNDLE

RNG = np.random.default_rng(3)
T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}
WIDE = {"height": 24, "width": 32, "num_inference_steps": 4, "max_sequence_length": 11, "output_type": "np"}


def in_float32(model: ir.Model) -> dict[str, Any]:
    return {name: constant_of(value) for name, value in model.graph.initializers.items()}


def rounded_db(model: ir.Model, folder: Path, **how: Any) -> float:
    """dB of the output after the weights were rounded."""
    x = {"x": RNG.standard_normal((40, model.graph.inputs[0].shape[1])).astype(np.float32)}
    (exact,) = outputs(model, x, folder).values()
    copy = ir.from_proto(ir.to_proto(model))
    assert round_weights(copy, **how) == 1
    (found,) = outputs(copy, x, folder).values()
    return psnr(exact, found)


def test_a_weight_of_8_bits_multiplies_what_is_not_rounded(tmp_path: Path) -> None:
    model = dense(256)
    round_weights(model)
    checked(model, tmp_path)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul", "Add"]
    kinds = {value.dtype: value.shape for value in model.graph.initializers.values() if len(value.shape or ()) == 2}
    assert kinds == {ir.DataType.INT8: (256, 48), ir.DataType.FLOAT: (2, 48)}


def test_blocks_keep_more_where_a_part_of_the_inputs_has_large_weights(tmp_path: Path) -> None:
    model = dense(256)
    weight = model.graph.initializers["w"]
    numbers = np.array(constant_of(weight))
    numbers[7] *= 20
    weight.const_value = ir.Tensor(numbers, name="w")
    by_output, by_block = (rounded_db(model, tmp_path, for_tensorrt=alone) for alone in (True, False))
    assert by_block > by_output + 2
    assert by_output > 30


def test_a_width_of_no_whole_blocks_has_one_scale_for_each_output(tmp_path: Path) -> None:
    assert rounded_db(dense(200), tmp_path) > 40


def test_rows_of_a_large_table_are_rounded_alone(tmp_path: Path) -> None:
    table = RNG.standard_normal((1024, 96)) * np.geomspace(1, 1000, 1024)[:, None]
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=7),
        helper.make_node("Gather", ["table", "ids"], ["found"], name="look_up"),
        helper.make_node("Neg", ["found"], ["y"], name="negated"),
    ]
    model = model_of(nodes, {"table": table}, ["rows"], ["rows", 96])
    ids = {"x": np.array([0, 1, 500, 1023], np.float32)}
    (exact,) = outputs(model, ids, tmp_path).values()
    assert round_weights(model, for_tensorrt=True) == 0
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT}
    round_weights(model)
    (found,) = outputs(model, ids, tmp_path).values()
    for one, other in zip(exact, found, strict=True):
        assert 40 < psnr(one, other) < 70


@pytest.fixture(scope="module", params=T5)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle, and the same with T5's weights in int8 for ONNX Runtime and OpenVINO."""
    own: Path = request.getfixturevalue(f"{request.param}_bundle")
    folder = Path(shutil.copytree(own, tmp_path_factory.mktemp("weights") / "bundle"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.getbasetemp() / "own"))
        patch.setattr(int8_weights, "BLOCK", 4)  # a tiny model has no width of 128
        for backend in ("ort", "openvino"):
            build(Bundle.open(folder), backend, options=BuildOptions("int8-weights"), report=lambda line: None)
        yield own, folder


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_pictures_are_near_those_in_float32(backend: str, built: tuple[Path, Path]) -> None:
    own, folder = built
    with sdopt.load(own, backend) as exact, sdopt.load(folder, backend, precision="int8-weights") as pipe:
        t5 = T5[pipe.bundle.manifest.family]
        assert pipe.precision.endswith(f"({t5} int8-weights)")
        one, other = (p.encode(["a cat"]) for p in (exact, pipe))
        assert 35 < psnr(one, other) < 80
        one, other = (p("a cat", seed=1, **WIDE).images for p in (exact, pipe))
    assert 35 < psnr(np.asarray(one), np.asarray(other)) < 120


def test_it_is_small_and_only_taken_by_name(built: tuple[Path, Path]) -> None:
    bundle = Bundle.open(built[1])
    name = T5[bundle.manifest.family]
    engine = usable(bundle, name, "ort", lambda record: {"provider": "CPU"}, precision="int8-weights")[0]
    assert {one.record.component for one in stored(bundle, "ort")} == {name}
    assert engine.record.notes["rounded_layers"] >= 7
    assert engine.record.notes["weight_bytes"] < 0.45 * bundle.nbytes(name)
    with sdopt.load(built[1]) as pipe:
        assert pipe.precision == "fp32"


def test_any_component_with_linear_layers_can_be_named(sd3_bundle: Path, own_folders: None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3_bundle, tmp_path / "bundle"))
    options = BuildOptions("int8-weights")
    build(Bundle.open(folder), "ort", components=["transformer"], options=options, report=lambda line: None)
    with sdopt.load(sd3_bundle) as exact, sdopt.load(folder, "ort", precision="int8-weights") as pipe:
        one, other = (p("a cat", seed=1, **WIDE).images for p in (exact, pipe))
        assert pipe.precision.startswith("int8-weights (")
    assert 30 < psnr(np.asarray(one), np.asarray(other)) < 100


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_tensorrt_rtx_builds_it(sd3_bundle: Path, own_folders: None, tmp_path: Path) -> None:
    bundle = Bundle.open(Path(shutil.copytree(sd3_bundle, tmp_path / "bundle")))
    options = BuildOptions("int8-weights", opt_level=0)
    build(bundle, "tensorrt-rtx", options=options, report=lambda line: None)
    (engine,) = stored(bundle, "tensorrt-rtx")
    assert (engine.record.component, engine.precision) == ("text_encoder_3", "int8-weights")
    assert engine.record.options["compute"] in ("bf16", "fp32")  # T5 leaves the range of fp16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "ort"], "this bundle has no T5; name what is built with --component: text_encoder, "),
        (["--backend", "tensorrt-rtx", "--refit"], "refit and int8-weights: weights that are rounded"),
        (["--backend", "ort", "--floor", "20"], "floor and prompts are for int8 and fp8"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle")
    assert main(["build", str(folder), "--precision", "int8-weights", *arguments]) == 2
    assert message in capsys.readouterr().err
