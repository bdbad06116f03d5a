"""int8: the pass on graphs, how scales are found, and what is built and runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import sdopt
from sdopt import graph
from sdopt.build import calibrations
from sdopt.build.calibrate import ON_CPU, Calibration, calibrate
from sdopt.build.int8 import LARGEST, SEVEN_BITS, Scaling, int8, layers_of, rounded, weight_scale
from sdopt.build.jobs import NO_VNNI, build
from sdopt.build.observe import Patch, patches
from sdopt.build.options import BuildOptions, exceptions, part_options
from sdopt.build.recipe import read_recipe
from sdopt.build.target import Target
from sdopt.bundle.files import Bundle, Component
from sdopt.bundle.specs import Array
from sdopt.cli.main import main
from sdopt.engine import openvino, openvino_int8
from sdopt.engine.ort import OrtEngine
from sdopt.engine.store import usable
from sdopt.errors import SdoptError, UsageError
from sdopt.metrics import psnr
from tests.build.common import checked, outputs
from tests.conftest import EMOJI_BUNDLE

PROMPTS = ("a red apple", "a blue heart", "a yellow star", "a green tree", "a dog", "a rocket", "a slice of pizza")
RNG = np.random.default_rng(5)


def dense(channels: int = 32, outputs: int = 48, norm: bool = False, bias: bool = True) -> ir.Model:
    """[LayerNormalization,] MatMul [, Add]."""
    weights = {"w": RNG.standard_normal((channels, outputs)) / channels**0.5, "b": RNG.standard_normal(outputs)}
    nodes, x = [], "x"
    if norm:
        weights |= {"scale": RNG.uniform(0.5, 2, channels), "shift": RNG.standard_normal(channels)}
        weights["scale"][3] = 60.0  # one large channel, as transformers have
        nodes.append(helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["n"], name="norm"))
        x = "n"
    nodes.append(helper.make_node("MatMul", [x, "w"], ["m"], name="dense"))
    nodes.append(helper.make_node("Add" if bias else "Identity", ["m", "b"] if bias else ["m"], ["y"], name="bias"))
    return model_of(nodes, weights, ["rows", channels], ["rows", outputs])


def convolution(stride: int = 1, window: int = 3) -> ir.Model:
    """SiLU, then Conv."""
    weights = {"w": RNG.standard_normal((24, 20, window, window)) / 10, "b": RNG.standard_normal(24)}
    pad = window // 2
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["a"]),
        helper.make_node("Conv", ["a", "w", "b"], ["y"], name="conv", strides=[stride] * 2, pads=[pad] * 4),
    ]
    return model_of(nodes, weights, [2, 20, "h", "w_"], [2, 24, "oh", "ow"])


def model_of(nodes: Any, weights: dict[str, Any], x: Any, y: Any) -> ir.Model:
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items() if n in used]
    inputs, outputs_ = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in (("x", x), ("y", y))
    )
    proto = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs_, constants), opset_imports=[helper.make_opsetid("", 23)]
    )
    proto = onnx.shape_inference.infer_shapes(proto)
    return ir.from_proto(proto)


def in_int8(model: ir.Model, scaling: Scaling, arrays: dict[str, Array], folder: Path) -> tuple[Array, ir.Model]:
    copy = ir.from_proto(ir.to_proto(model))
    assert int8(copy, {layer.weight: scaling for layer in layers_of(copy)}) == 1
    checked(copy, folder)
    return outputs(copy, arrays, folder)["y"], copy


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_linear_layer_multiplies_what_is_rounded(tmp_path: Path) -> None:
    model, x = dense(), RNG.standard_normal((40, 32)).astype(np.float32)
    scale = float(np.abs(x).max() / 127)
    got, changed = in_int8(model, Scaling(scale), {"x": x}, tmp_path)
    (exact,) = outputs(model, {"x": x}, tmp_path).values()
    assert 35 < psnr(exact, got) < 60
    assert operators(changed).count("QuantizeLinear") == 1
    assert operators(changed).count("DequantizeLinear") == 2
    weight = next(v for n, v in changed.graph.initializers.items() if v.dtype == ir.DataType.INT8 and "weight" in n)
    assert weight.shape == (32, 48)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_a_convolution_behind_silu_takes_uint8(stride: int, window: int, tmp_path: Path) -> None:
    model, x = convolution(stride, window), RNG.standard_normal((2, 20, 12, 8)).astype(np.float32)
    inner = x / (1 + np.exp(-x))
    (exact,) = outputs(model, {"x": x}, tmp_path).values()
    low, high = float(inner.min()), float(inner.max())
    scale = (high - low) / 255
    unsigned, _ = in_int8(model, Scaling(scale, zero=round(-low / scale)), {"x": x}, tmp_path)
    signed, _ = in_int8(model, Scaling(high / 127), {"x": x}, tmp_path)
    assert psnr(exact, unsigned) > psnr(exact, signed) > 35


def test_factors_go_into_the_norm_and_help_where_one_channel_is_large(tmp_path: Path) -> None:
    model, x = dense(norm=True), RNG.standard_normal((64, 32)).astype(np.float32)
    (exact,) = outputs(model, {"x": x}, tmp_path).values()
    factors = np.ones(32, np.float32)
    factors[3] = 30.0
    plain, _ = in_int8(model, Scaling(150 / 127), {"x": x}, tmp_path)
    smooth, changed = in_int8(model, Scaling(6 / 127, factors), {"x": x}, tmp_path)
    assert "Mul" not in operators(changed)
    assert psnr(exact, smooth) > psnr(exact, plain) + 6


def test_factors_without_a_norm_are_a_product(tmp_path: Path) -> None:
    model, x = dense(), RNG.standard_normal((64, 32)).astype(np.float32)
    x[:, 3] *= 50
    (exact,) = outputs(model, {"x": x}, tmp_path).values()
    factors = np.ones(32, np.float32)
    factors[3] = 50.0
    smooth, changed = in_int8(model, Scaling(5 / 127, factors), {"x": x}, tmp_path)
    plain, _ = in_int8(model, Scaling(200 / 127), {"x": x}, tmp_path)
    assert "Mul" in operators(changed)
    assert psnr(exact, smooth) > psnr(exact, plain)


@pytest.mark.parametrize("make", [dense, convolution])
def test_the_bias_takes_back_a_mean_error(make: Any, tmp_path: Path) -> None:
    model = make()
    x = RNG.standard_normal((64, 32) if make is dense else (2, 20, 8, 8)).astype(np.float32)
    (plain, _), width = in_int8(model, Scaling(0.05), {"x": x}, tmp_path), 48 if make is dense else 24
    moved, _ = in_int8(model, Scaling(0.05, shift=np.full(width, 0.25, np.float32)), {"x": x}, tmp_path)
    assert np.allclose(plain - moved, 0.25, atol=1e-4)


def test_fp8_is_what_onnx_runtime_rounds(tmp_path: Path) -> None:
    model, x = dense(), RNG.standard_normal((40, 32)).astype(np.float32)
    (exact,) = outputs(model, {"x": x}, tmp_path).values()
    scale = float(np.abs(x).max() / 448)
    got, changed = in_int8(model, Scaling(scale, kind="fp8", largest_weight=LARGEST["fp8"]), {"x": x}, tmp_path)
    (layer,) = layers_of(model)
    weight = layer.numbers
    rounded_weight = rounded(weight, weight_scale(weight, False, LARGEST["fp8"]), kind="fp8")
    bias = exact[0] - x[0] @ weight
    assert psnr(rounded(x, scale, kind="fp8") @ rounded_weight + bias, got) > 90
    assert 25 < psnr(exact, got) < 50
    kinds = [v.dtype for v in changed.graph.initializers.values()]
    assert ir.DataType.FLOAT8E4M3FN in kinds
    assert ir.DataType.INT8 not in kinds


def extreme(is_conv: bool) -> tuple[ir.Model, Array]:
    """A layer whose products are as large as int8 allows, and an input."""
    if is_conv:
        weights, x = {"w": np.full((24, 20, 3, 3), 0.5)}, np.full((1, 20, 8, 8), 2, np.float32)
        node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1] * 4)
        return model_of([node], weights, [1, 20, "h", "w_"], [1, 24, "h", "w_"]), x
    weights, x = {"w": np.full((64, 48), 0.5)}, np.full((8, 64), 2, np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")
    return model_of([node], weights, ["rows", 64], ["rows", 48]), x


@pytest.mark.parametrize("backend", ["openvino", "ort"])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("is_conv", [True, False])
def test_sums_of_the_largest_products_are_right_on_every_processor(
    is_conv: bool, zero: int, backend: str, tmp_path: Path
) -> None:
    model, x = extreme(is_conv)
    (exact,) = outputs(model, {"x": x}, tmp_path).values()
    target = Target(backend, None, None, None)
    largest = target.arithmetic("int8").largest_weight
    scaling = Scaling(2 / (254 if zero else 127), zero=zero, largest_weight=largest)
    assert int8(model, {layer.weight: scaling for layer in layers_of(model)}) == 1
    graph.save(model, tmp_path / "short.onnx")
    component = Component("layer", tmp_path / "short.onnx", *graph.specs(model))
    opened = OrtEngine if backend == "ort" else openvino.open_int8
    with opened(component) as engine:
        assert psnr(exact, engine(x=x)["y"]) > 40


def test_weights_of_seven_bits() -> None:
    model, _ = extreme(False)
    int8(model, {"w": Scaling(0.1, largest_weight=SEVEN_BITS)})
    (numbers,) = (v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("int8/weight"))
    assert np.abs(numbers).max() == 63


def test_rounding_is_that_of_the_operators() -> None:
    x = np.linspace(-3, 9, 50, dtype=np.float32)
    assert np.abs(rounded(x, 0.05, 64) - np.clip(x, -3.2, 9.55)).max() <= 0.0251
    assert np.abs(rounded(x, 0.05) - np.clip(x, -6.35, 6.35)).max() <= 0.0251


@pytest.mark.parametrize(("stride", "pads"), [((1, 1), (1, 1, 1, 1)), ((2, 2), (0, 0, 1, 1)), ((1, 2), (0, 1, 0, 1))])
def test_windows_times_the_weight_are_outputs_of_the_convolution(stride: Any, pads: Any, tmp_path: Path) -> None:
    x, w = (RNG.standard_normal(shape).astype(np.float32) for shape in ((1, 3, 7, 9), (5, 3, 3, 3)))
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=stride, pads=pads)
    model = model_of([node], {"w": w}, [1, 3, 7, 9], [1, 5, "h", "v"])
    (y,) = outputs(model, {"x": x}, tmp_path).values()
    rows, places = patches(x, Patch((3, 3), stride, pads), 40, np.random.default_rng(0))
    assert places == y[0, 0].size
    possible = np.moveaxis(y[0], 0, -1).reshape(-1, 5)
    for made in rows @ w.reshape(5, -1).T:
        assert np.abs(possible - made).max(1).min() < 1e-4


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(Bundle.open(EMOJI_BUNDLE), "unet", PROMPTS, steps=4)


def test_a_calibration_is_reproducible(calibration: Calibration) -> None:
    other = calibrate(Bundle.open(EMOJI_BUNDLE), "unet", PROMPTS, steps=4)
    assert len(calibration.choices) > 100
    for name, choice in calibration.choices.items():
        twin = other.choices[name]
        assert choice.scaling.scale == pytest.approx(twin.scaling.scale, rel=1e-4)
        assert choice.products == twin.products
        assert choice.harm == pytest.approx(twin.harm, rel=0.05)


def test_the_floor_decides_how_many_layers_stay(calibration: Calibration) -> None:
    lines: list[str] = []
    every = calibration.scalings()
    assert set(every) == set(calibration.choices)
    scalings, reached = calibration.searched(33.0, lines.append)
    assert reached >= 33.0 > calibration.fidelity(every) > 20
    assert len(every) > len(scalings) > 0.7 * len(every)
    assert 0.6 < calibration.part(scalings) < 1
    assert f"{reached:.1f} dB" in lines[-1]
    assert len({line.partition(" of ")[0] for line in lines}) == len(lines)  # each choice is measured once
    with pytest.raises(
        UsageError, match=r"reaches 59 dB only where most layers stay as they are; give a lower --floor, e.g. \d\d"
    ):
        calibration.searched(59.0, lines.append)


def test_the_sum_of_harm_predicts_the_error(calibration: Calibration) -> None:
    predicted = -10 * np.log10(sum(choice.harm for choice in calibration.choices.values()))
    assert abs(predicted - calibration.fidelity(calibration.scalings())) < 3


def test_a_calibration_is_kept_and_a_damaged_one_is_made_again(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def remade(bundle: Bundle, name: str, prompts: Any, **how: Any) -> Calibration:
        made.append(name)
        return calibration

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrations, "calibrate", remade)
    bundle = Bundle.open(EMOJI_BUNDLE)

    def searched() -> Any:
        return calibrations.Calibrations(bundle, ON_CPU).searched("unet", PROMPTS, 20.0, lambda line: None)

    first, second = searched(), searched()
    assert made == ["unet"]
    assert first[1:] == second[1:]
    for name, scaling in first[0].items():
        assert second[0][name].scale == scaling.scale
        for one, other in ((scaling.factors, second[0][name].factors), (scaling.shift, second[0][name].shift)):
            assert (one is None and other is None) or np.array_equal(one, other)
    (file,) = tmp_path.rglob("unet-*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    searched()
    searched()
    assert made == ["unet", "unet"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    shutil.copytree(EMOJI_BUNDLE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        lines: list[str] = []
        for backend in ("openvino", "ort"):
            options = BuildOptions("int8", floor=22.0, prompts=PROMPTS)
            build(Bundle.open(folder), backend, options=options, report=lines.append)
    assert lines.count(NO_VNNI) == int(openvino_int8.sums_saturate())
    return folder


@pytest.mark.parametrize("backend", ["openvino", "ort"])
def test_pictures_in_int8_are_near_those_in_float32(backend: str, built: Path) -> None:
    with sdopt.load(EMOJI_BUNDLE, "ort") as exact, sdopt.load(built, backend, precision="int8") as pipe:
        assert pipe.precision.startswith("int8 (text_encoder fp32")
        one, other = (p("a red apple", seed=1, num_inference_steps=8, output_type="np").images for p in (exact, pipe))
    assert 22 < psnr(np.asarray(one), np.asarray(other)) < 60


@pytest.mark.parametrize("backend", ["openvino", "ort"])
def test_an_adapter_of_which_nothing_is_built_runs_beside_int8(backend: str, built: Path) -> None:
    shape = Image.new("RGB", (128, 128))
    shape.paste((255, 255, 255), (32, 32, 96, 96))
    options = {"control_image": shape, "seed": 1, "num_inference_steps": 4, "output_type": "np"}
    with sdopt.load(EMOJI_BUNDLE, "ort") as exact, sdopt.load(built, backend, precision="int8") as pipe:
        one, other = (p("a red apple", **options).images for p in (exact, pipe))
    assert psnr(np.asarray(one), np.asarray(other)) > 22


def test_engines_in_int8_are_small_and_only_taken_by_name(built: Path) -> None:
    unet = usable(Bundle.open(built), "unet", "openvino", lambda r: r.environment, precision="int8")[0]
    assert unet.record.notes["quantized_layers"] > 100
    assert unet.record.notes["quantized_db"] >= 22.0
    weights = sum(f.bytes for n, f in unet.record.files.items())
    assert weights < 0.6 * (EMOJI_BUNDLE / "unet.onnx.data").stat().st_size  # which are float16
    for backend in ("openvino", "ort"):
        with sdopt.load(built, backend) as pipe:
            assert pipe.precision == "fp32"
    with sdopt.load(built, precision="int8") as pipe:
        assert pipe.backend == "ort"


def test_a_graph_for_a_processor_of_another_kind_is_stale(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = openvino_int8.sums_saturate()
    monkeypatch.setattr(openvino_int8, "sums_saturate", lambda: not here)
    with (
        pytest.raises(SdoptError, match="unet is stale: sums of int8 products was .*, is .*Build it: ") as caught,
        sdopt.load(built, "openvino", precision="int8") as pipe,
    ):
        pipe("a red apple", num_inference_steps=1)
    command = str(caught.value).partition("Build it: sdopt ")[2]
    assert "--profile" not in command  # which OpenVINO's graphs do not have


@pytest.mark.parametrize("backend", ["openvino", "ort"])
def test_a_lora_is_refused_in_int8(backend: str, built: Path) -> None:
    with sdopt.load(built, backend, precision="int8") as pipe:
        pipe.load_lora_weights("neon")
        with pytest.raises(SdoptError, match="int8 takes no LoRA"):
            pipe("a red apple", num_inference_steps=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backend", "openvino", "--precision", "int8", "--floor", "90"], "floor = 90 dB; allowed are 0 to 60"),
        (["--backend", "tensorrt-rtx", "--precision", "int8", "--refit"], "refit and int8"),
        (["--backend", "openvino", "--floor", "20"], "floor and prompts are for int8 and fp8"),
        (
            ["--backend", "ort", "--precision", "fp8"],
            "for ort fp32, fp16, bf16, int8 and int8-weights are",
        ),
        (["--backend", "openvino", "--precision", "fp8"], "for openvino fp32, int8 and int8-weights are built"),
        (["--backend", "openvino", "--precision", "bf16"], "for openvino fp32, int8 and int8-weights are built"),
        (["--backend", "openvino", "--precision", "int8", "--component", "unet_step"], "OpenVINO runs no fused steps"),
        (["--backend", "openvino"], "OpenVINO computes it in fp32 without a build; give --precision int8"),
        (["--backend", "openvino:gpu", "--precision", "int8"], "there is openvino, on the CPU"),
        (["--backend", "openvino", "--precision", "int8", "--prompts", "{one}"], "it has 1 prompts; two or more"),
        (["--backend", "openvino", "--precision", "int8", "--prompts", "{empty}"], "it has 0 prompts; two or more"),
        (["--backend", "openvino", "--precision", "int8", "--prompts", "{none}"], "a prompt in each line"),
        (["--backend", "openvino", "--precision", "int8", "--prompts", "{picture}"], "a prompt in each line"),
    ],
)
def test_wrong_options_say_so(arguments: list[str], text: str, tmp_path: Path, capsys: Any) -> None:
    contents = {"one": b"a cat\n\n", "empty": b"", "picture": b"\x89PNG\xff\xfe\x00"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle")
    paths = {name: tmp_path / name for name in (*contents, "none")}
    words = [word.format(**paths) for word in arguments]
    assert main(["build", str(tmp_path / "bundle"), *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "bundle/engines").exists()


def test_what_overflows_in_fp16_is_not_quantized_on_a_gpu(sdxl_bundle: Path) -> None:
    bundle, recipe = Bundle.open(sdxl_bundle), read_recipe()
    unsafe = replace(bundle.manifest, float16_unsafe=("vae_decoder",), float16_attention_unsafe=("unet",))
    object.__setattr__(bundle, "manifest", unsafe)
    options = BuildOptions("int8")
    decoder, unet, text = (recipe.parts[name] for name in ("vae_decoder", "unet_step", "text_encoder"))
    on_gpu, on_cpu = (part_options(options, decoder, bundle, True, rest=rest) for rest in ("fp16", "fp32"))
    assert (on_gpu["precision"], on_cpu["precision"]) == ("bf16", "int8")
    assert "which leaves fp16 around it" in exceptions(on_gpu, "int8", decoder, bundle)[0]
    assert part_options(options, unet, bundle, rest="fp16")["attention"]
    own = part_options(options, text, bundle, rest="fp16")
    assert own["precision"] == "fp16"
    assert not exceptions(own, "int8", text, bundle)


def test_what_is_not_built_says_how(capsys: Any, tmp_path: Path) -> None:
    shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle")
    with pytest.raises(SdoptError, match=r"sdopt build .*bundle --backend openvino --precision int8"):
        sdopt.load(tmp_path / "bundle", "openvino", precision="int8")
    with pytest.raises(SdoptError, match=r"sdopt build BUNDLE --backend openvino --precision int8"):
        sdopt.load(tmp_path / "bundle", precision="int8")
