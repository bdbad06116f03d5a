"""A half graph is half where it can be, float32 where it must be, and says so."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.build.fuse_step import fuse_step
from sdopt.build.half import half
from sdopt.build.simulate import outputs_of
from sdopt.errors import UsageError
from sdopt.metrics import psnr
from tests.build.common import half_outputs, inputs_of, opened, outputs, parity
from tests.conftest import EMOJI_BUNDLE

UNET = EMOJI_BUNDLE / "unet.onnx"
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(("dtype", "floor_db"), [("float16", 60), ("bfloat16", 40)])
def test_every_component_keeps_its_parity(component: str, dtype: str, floor_db: float, tmp_path: Path) -> None:
    source = EMOJI_BUNDLE / f"{component}.onnx"
    assert parity(source, lambda model: half(model, dtype=dtype), tmp_path, half=True) >= floor_db


def test_the_unet_of_sdxl_keeps_its_parity(sdxl_unet: Path, tmp_path: Path) -> None:
    assert parity(sdxl_unet, half, tmp_path, half=True) >= 55


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_cast_stands_only_where_a_value_crosses(component: str) -> None:
    model = graph.load(EMOJI_BUNDLE / f"{component}.onnx")
    report = half(model)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == report.casts <= 5
    for node in casts:
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        assert {source.dtype, target.dtype} == {graph.F32, graph.F16}
        assert not source.is_initializer()
        assert source.producer() is None or source.producer().op_type != "Cast"
    assert len({node.inputs[0] for node in casts}) == len(casts)


def test_a_weight_that_is_stored_as_float16_is_used_as_it_is() -> None:
    model = graph.load(UNET)
    stored = {v.name: v.const_value for v in graph.weights(model) if v.dtype == graph.F16}
    half(model)
    kept = {v.name: v.const_value for v in graph.weights(model)}
    assert len(stored) > 100
    assert all(kept[name] is tensor for name, tensor in stored.items())
    assert not [v.name for v in graph.weights(model) if v.dtype == graph.F32 and v.const_value.size > 64]


def test_twice_is_as_good_as_once(tmp_path: Path) -> None:
    once, twice = graph.load(UNET), graph.load(UNET)
    first = half(once)
    half(twice)
    assert half(twice) == first
    arrays = inputs_of(UNET)
    np.testing.assert_array_equal(*(half_outputs(m, arrays, tmp_path)["noise_pred"] for m in (once, twice)))


def test_the_timestep_stays_exact() -> None:
    model = graph.load(UNET)
    report = half(model)
    assert set(report.islands.values()) == {"leads to the timestep embedding"}
    for node in model.graph:
        if node.op_type in ("Sin", "Cos"):
            assert {value.dtype for value in (*node.inputs, *node.outputs)} == {graph.F32}
    assert not [
        user
        for value in model.graph.inputs
        if value.name == "timestep"
        for user, _ in value.uses()
        if user.op_type == "Cast"
    ]


def test_named_nodes_and_attention_stay_float32() -> None:
    model = graph.load(UNET)
    report = half(model, attention=True, islands=["node_conv2d_4", "Gelu"])
    alone = {n.name for n in model.graph if n.outputs[0].dtype == graph.F32 and n.op_type in ("Attention", "Gelu")}
    assert len(alone) == 21
    assert report.islands["node_conv2d_4"] == "named by 'node_conv2d_4'"
    assert set(report.islands) >= alone
    with pytest.raises(UsageError, match="island 'Gelus' matches no node of this graph; operators are .*Gelu"):
        half(graph.load(UNET), islands=["Gelus"])
    with pytest.raises(UsageError, match="precision 'half'; allowed are"):
        half(graph.load(UNET), dtype="half")


def test_edges_are_half_where_that_is_asked_for(tmp_path: Path) -> None:
    model = graph.load(UNET)
    half(model, half_edges=["encoder_*", "noise_pred"])
    inputs, ends = graph.specs(model)
    assert {s.name: s.dtype for s in (*inputs, *ends)} == {
        "sample": "float32", "timestep": "float32", "encoder_hidden_states": "float16", "noise_pred": "float16",
    }  # fmt: skip
    arrays = inputs_of(UNET)
    arrays["encoder_hidden_states"] = arrays["encoder_hidden_states"].astype(np.float16)
    actual = outputs(model, arrays, tmp_path)["noise_pred"]
    assert actual.dtype == np.float16
    assert psnr(outputs(graph.load(UNET), inputs_of(UNET), tmp_path)["noise_pred"], actual) > 50
    with pytest.raises(UsageError, match="half edge 'latents' matches no input or output; there are .*sample"):
        half(graph.load(UNET), half_edges=["latents"])


def reweigh(model: ir.Model, name: str, change: Any) -> None:
    """Replace a weight by what `change` makes of it, in float32 and without its Cast."""
    value = next(v for v in graph.weights(model) if v.name == name)
    cast = next(user for user, _ in value.uses()).outputs[0]
    array = change(value.const_value.numpy().astype(np.float32))
    value.name, value.dtype = name + ".changed", graph.F32
    value.const_value = ir.Tensor(array, name=value.name)
    graph.redirect(cast, value)


WEIGHT = "down_blocks.1.resnets.0.conv1.weight"


def test_a_weight_outside_the_range_is_named_and_its_readers_stay_float32(tmp_path: Path) -> None:
    def enlarge(array: Any) -> Any:
        array[0, 0, 0, 0] = 7e4
        return array

    model, exact = graph.load(UNET), graph.load(UNET)
    for each in (model, exact):
        reweigh(each, WEIGHT, enlarge)
    report = half(model)
    assert report.outside == {f"{WEIGHT}.changed": 7e4}
    assert report.islands["node_conv2d_4"] == f"its weight {WEIGHT}.changed has 7e+04"
    stored = {v.name: v.dtype for v in graph.weights(model)}
    assert stored[f"{WEIGHT}.changed"] == graph.F32
    bf16 = graph.load(UNET)
    reweigh(bf16, WEIGHT, enlarge)
    assert half(bf16, dtype="bfloat16").outside == {}


def small_graph(*nodes: ir.Node, x: ir.Value, y: ir.Value, constants: list[ir.Value]) -> ir.Model:
    return ir.Model(
        ir.Graph([x], [y], nodes=nodes, initializers=constants, opset_imports={"": 23}, name="small"), ir_version=10
    )


def value(name: str, *shape: int, data: Any = None) -> ir.Value:
    made = ir.Value(name=name, type=ir.TensorType(graph.F32), shape=ir.Shape(shape))
    if data is not None:
        made.const_value = ir.Tensor(np.asarray(data, np.float32), name=name)
    return made


def test_a_constant_that_would_vanish_or_mask_is_kept_from_harm(tmp_path: Path) -> None:
    x, a, y = value("x", 4), value("a", 4), value("y", 4)
    tiny, mask = value("tiny", data=1e-12), value("mask", data=np.finfo(np.float32).min)
    nodes = [
        ir.node("Add", [x, tiny], outputs=[a], name="guard"),
        ir.node("Max", [a, mask], outputs=[y], name="floor"),
    ]
    model = small_graph(*nodes, x=x, y=y, constants=[tiny, mask])
    report = half(model)
    assert report.outside == {"tiny": pytest.approx(1e-12)}
    assert report.clamped == ("mask",)
    assert "guard" in report.islands
    actual = half_outputs(model, {"x": np.zeros(4, np.float32)}, tmp_path)["y"]
    assert np.isfinite(actual).all()


def test_what_overflows_in_half_overflows_in_the_rounded_graph(tmp_path: Path) -> None:
    x, a, y = value("x", 2), value("a", 2), value("y", 2)
    big, small = value("big", data=1000), value("small", data=0.001)
    nodes = [ir.node("Mul", [x, big], outputs=[a], name="up"), ir.node("Mul", [a, small], outputs=[y], name="down")]
    model = small_graph(*nodes, x=x, y=y, constants=[big, small])
    half(model)
    actual = half_outputs(model, {"x": np.array([1.0, 100.0], np.float32)}, tmp_path)["y"]
    assert actual[0] == pytest.approx(1.0, rel=1e-3)
    assert np.isinf(actual[1])


def test_the_sampler_of_a_half_step_is_float32(tmp_path: Path) -> None:
    model = fuse_step(graph.load(UNET))
    half(model)
    for node in model.graph:
        if node.name.startswith("step/") and not node.name.startswith("step/both") and node.op_type != "Cast":
            assert graph.F16 not in {v.dtype for v in (*node.inputs, *node.outputs) if v is not None}
    joined = [node for node in model.graph if node.name.startswith("step/both")]
    assert {v.dtype for node in joined for v in node.outputs} == {graph.F16}
    assert parity_of_step(model, tmp_path) > 60


def parity_of_step(model: ir.Model, folder: Path) -> float:
    exact = fuse_step(graph.load(UNET))
    arrays = inputs_of_step(exact)
    wanted, actual = outputs(exact, arrays, folder), half_outputs(model, arrays, folder)
    return min(psnr(wanted[name], actual[name]) for name in wanted)


def inputs_of_step(model: ir.Model) -> Any:
    from sdopt.build.examples import example
    from tests.build.common import SIZES

    arrays = example(graph.specs(model)[0], SIZES)
    arrays["row"][:, :6] = [500, 2, 0, 0.5, 0.7, -0.4]
    return arrays


def test_weights_pass_through_one_at_a_time(tmp_path: Path) -> None:
    edge, count = 512, 24  # 1 MB each in float32
    x = value("x", 1, edge)
    nodes, constants, now = list[ir.Node](), list[ir.Value](), x
    for i in range(count):
        weight = value(f"w{i}", edge, edge, data=np.random.default_rng(i).standard_normal((edge, edge)) / edge**0.5)
        following = value(f"h{i}", 1, edge)
        nodes.append(ir.node("MatMul", [now, weight], outputs=[following], name=f"n{i}"))
        constants.append(weight)
        now = following
    graph.save(small_graph(*nodes, x=x, y=now, constants=constants), tmp_path / "big.onnx")
    del nodes, constants
    tracemalloc.start()
    model = graph.load(tmp_path / "big.onnx")
    half(model)
    graph.save(model, tmp_path / "half.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "half.onnx.data").stat().st_size == count * edge * edge * 2
    assert peak < 8 << 20
    with pytest.raises(UsageError, match="still reads its weights from this file"):
        graph.save(graph.load(tmp_path / "half.onnx"), tmp_path / "half.onnx")


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    from sdopt.errors import BundleError

    (tmp_path / "a.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="not an ONNX graph that can be read"):
        graph.load(tmp_path / "a.onnx")


def test_half_runs_as_it_is_on_onnx_runtime(tmp_path: Path) -> None:
    model = graph.load(EMOJI_BUNDLE / "vae_decoder.onnx")
    half(model)
    arrays = inputs_of(EMOJI_BUNDLE / "vae_decoder.onnx")
    actual = outputs_of(opened(model, tmp_path), arrays)["sample"]
    assert actual.dtype == np.float32
    assert psnr(outputs(graph.load(EMOJI_BUNDLE / "vae_decoder.onnx"), arrays, tmp_path)["sample"], actual) > 60
