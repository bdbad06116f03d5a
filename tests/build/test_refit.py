"""Every weight that a LoRA may touch is one that TensorRT can change, by the name that it has in the bundle."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdopt import graph
from sdopt.build.derive import derive
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions, part_options
from sdopt.build.recipe import read_recipe
from sdopt.build.refit import refittable, widen_weights
from sdopt.build.trt_build import Builder
from sdopt.bundle.files import Bundle
from sdopt.bundle.weight_names import parse
from sdopt.bundle.weights import Weights
from sdopt.engine.store import stored
from sdopt.engine.trt_api import TensorRT
from sdopt.errors import BackendError, UsageError
from tests.build.common import parity
from tests.conftest import EMOJI_BUNDLE
from tests.fakes.trt_refit import FakeWeights

PARTS = ("unet", "unet_step", "unet_step_alone", "text_encoder")
RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "sdopt[tensorrt-rtx]"',
)


@RTX
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", PARTS)
def test_the_library_knows_every_parameter_by_its_name(name: str, precision: str, tmp_path: Path) -> None:
    bundle, recipe = Bundle.open(EMOJI_BUNDLE), read_recipe()
    part = recipe.parts[name]
    options = part_options(BuildOptions(precision=precision, refit="lora"), part, bundle)
    builder = Builder(TensorRT("tensorrt-rtx"), options, None, name=name)
    model, _ = derive(bundle, part, options, builder)
    table = refittable(model, constants=not builder.refits_some)
    base = Weights.of(bundle.component(part.graph))
    held = [parse(weight) for weight in table.weights]
    assert {weight.parameter for weight in held if weight is not None} == set(base.parameters)
    assert set(table.weights.values()) <= {"float32", {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")}
    graph.save(model, tmp_path / "graph.onnx")

    library = builder._builder()
    network = library.create_network(builder._network_flags())
    parser = builder._parsed(network, tmp_path / "graph.onnx")
    builder._mark(network, table.weights)
    assert all(network.are_weights_marked_refittable(weight) for weight in table.weights)
    with pytest.raises(BackendError, match=r"knows no weight 'no.such.weight', one of 1"):
        builder._mark(network, ["no.such.weight"])
    config = builder._config(library, graph.specs(model)[0], [], None, [])
    flags = builder.lib.trt.BuilderFlag
    assert (config.get_flag(flags.REFIT_INDIVIDUAL), config.get_flag(flags.REFIT)) == (True, False)
    del parser


def test_a_decoder_takes_no_lora_and_is_built_as_ever() -> None:
    bundle, part = Bundle.open(EMOJI_BUNDLE), read_recipe().parts["vae_decoder"]
    assert part_options(BuildOptions(refit="lora"), part, bundle) == part_options(BuildOptions(), part, bundle)
    assert part_options(BuildOptions(refit=True), part, bundle)["refit"] is True


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match="refit = 'unet'; allowed are True, False and 'lora'"):
        BuildOptions(refit="unet")


def test_weights_that_a_cast_widens_are_float32_themselves(tmp_path: Path) -> None:
    source = Bundle.open(EMOJI_BUNDLE).component("text_encoder").graph
    model = graph.load(source)
    narrow = sum(value.dtype == graph.F16 for value in graph.weights(model))
    casts = sum(node.op_type == "Cast" for node in model.graph)
    widen_weights(model)
    assert narrow
    assert not [value for value in graph.weights(model) if value.dtype == graph.F16]
    assert sum(node.op_type == "Cast" for node in model.graph) == casts - narrow
    assert parity(source, widen_weights, tmp_path) > 150


def test_an_engine_that_refits_to_something_else_is_not_kept(
    bundle: Bundle, own_folders: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(precision="fp16", refit="lora")
    how: dict[str, Any] = {"components": ["text_encoder"], "options": options, "report": lambda line: None}
    build(bundle, "tensorrt", **how)
    (engine,) = stored(bundle, "tensorrt")
    assert engine.record.notes["agreement"]["refitted"] > 150
    shutil.rmtree(engine.folder)
    read = FakeWeights.read
    monkeypatch.setattr(FakeWeights, "read", lambda weights: read(weights)[::-1])  # a library that mixes them up
    with pytest.raises(BackendError, match=r"text_encoder: with its own weights given anew, .* without --refit"):
        build(bundle, "tensorrt", **how)
    assert stored(bundle, "tensorrt") == []
