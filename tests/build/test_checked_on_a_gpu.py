"""`sdopt build` on the fake GPU: plans are made, run, and their rows compared, as each version of TensorRT does it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.agree import Agreement
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions, part_options
from sdopt.build.recipe import read_recipe
from sdopt.build.target import Target
from sdopt.bundle.files import Bundle
from sdopt.engine.store import PLAN, stored
from sdopt.engine.trt_api import TensorRT
from sdopt.errors import BackendError, UsageError
from tests.conftest import PlugIn

SIZES = ["batch=1:1:3 height=64 width=64"]
EXACT = BuildOptions(precision="fp32")
pytestmark = pytest.mark.usefixtures("own_folders")


def quiet(line: str) -> None: ...


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt:1"])
@pytest.mark.parametrize("component", ["unet_step", "text_encoder"])
def test_a_finished_engine_is_run_and_its_rows_agree(
    component: str, backend: str, bundle: Bundle, plug_in: PlugIn
) -> None:
    gpu = plug_in(devices=2)
    (folder,) = build(bundle, backend, components=[component], profiles=SIZES, options=EXACT, report=quiet)
    (engine,) = stored(bundle, "tensorrt")
    assert (folder / PLAN).exists()
    agreement = engine.record.notes["agreement"]
    assert set(agreement) == {"rows", "alone", *(["halves"] if component == "unet_step" else [])}
    assert min(agreement.values()) > 80
    assert engine.record.environment["GPU"] == ("Fake GPU 1" if backend.endswith("1") else "Fake GPU")
    assert gpu.cudaGetDevice() == (0, 0)


@pytest.mark.parametrize("flavour", ["10", "10.0", "8.6"])
def test_every_version_builds_half_engines_and_runs_them(flavour: str, bundle: Bundle, plug_in: PlugIn) -> None:
    plug_in(flavour)
    lines: list[str] = []
    build(bundle, "tensorrt", profiles=SIZES, report=lines.append)
    with sdopt.load(bundle.path, backend="tensorrt") as pipe:
        options: dict[str, Any] = {"height": 64, "width": 64, "seed": 1, "num_inference_steps": 2}
        picture = pipe("a red apple", output_type="np", **options).images
        assert set(pipe.pool.opened) == {"text_encoder", "unet_step", "vae_decoder"}
    with sdopt.load(bundle.path, backend="ort:cpu") as pipe:
        expected = pipe("a red apple", output_type="np", **options).images
    assert abs(picture - expected).max() < 0.05
    lowered = [line for line in lines if "written in operators" in line]
    assert bool(lowered) == (flavour != "10")


def test_islands_stay_float32_in_8_6_where_a_flag_alone_would_not_keep_them(bundle: Bundle, plug_in: PlugIn) -> None:
    plug_in("8.6")
    build(bundle, "tensorrt", components=["unet_step"], profiles=SIZES, report=quiet)
    (engine,) = stored(bundle, "tensorrt")
    layers = json.loads((engine.folder / PLAN).read_bytes().partition(b"\n")[0])["layers"]
    sampler = [kind for name, kind in layers.items() if name.startswith("step/") and kind in ("HALF", "FLOAT")]
    assert len(sampler) > 10
    assert sampler.count("HALF") <= 2  # what joins two tensors
    assert list(layers.values()).count("HALF") > 100
    assert engine.record.notes["islands_shown"]


def test_an_engine_whose_rows_differ_is_not_kept(bundle: Bundle, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdopt.build.agree.measure", lambda engine, profile: Agreement(rows=11.4))
    with pytest.raises(BackendError, match=r"vae_encoder: identical rows .* alike to 11.4 dB, and 40 dB is what fp32"):
        build(bundle, "tensorrt", components=["vae_encoder"], profiles=SIZES, options=EXACT, report=quiet)
    assert stored(bundle, "tensorrt") == []


def test_sizes_that_were_built_one_after_the_other_are_all_there(bundle: Bundle, gpu: Any) -> None:
    lines: list[str] = []
    for size in (64, 96, 64):
        sizes = [f"batch=1 height={size} width={size}"]
        build(bundle, "tensorrt", components=["vae_decoder"], profiles=sizes, options=EXACT, report=lines.append)
    assert sum("already built" in line for line in lines) == 1
    with sdopt.load(bundle.path, backend="tensorrt") as pipe:
        for size in (8, 12):
            latents = np.zeros((1, 4, size, size), np.float32)
            assert pipe.engine("vae_decoder")(latent_sample=latents)["sample"].shape == (1, 3, 8 * size, 8 * size)


def test_a_vae_that_overflows_in_half_is_bf16_on_a_gpu_that_computes_in_it(bundle: Bundle, gpu: Any) -> None:
    unsafe = Bundle(bundle.path, replace(bundle.manifest, float16_unsafe=("vae_encoder",)))
    part, target = read_recipe().parts["vae_encoder"], Target.here("tensorrt")
    assert part_options(BuildOptions(), part, unsafe, target.has_bf16)["precision"] == "bf16"


def test_what_the_builder_logs_is_told(bundle: Bundle, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fakes.trt_builder.LEAST_WORKSPACE", 1 << 40)
    lines: list[str] = []
    with pytest.raises(BackendError, match=r"no kernel fits into the memory.*Could not find any implementation"):
        build(bundle, "tensorrt", components=["vae_encoder"], profiles=SIZES, report=lines.append)
    assert sum("trying less" in line for line in lines) >= 2
    assert stored(bundle, "tensorrt") == []


def test_the_folder_of_engines_is_the_bundles(bundle: Bundle, gpu: Any) -> None:
    (folder,) = build(bundle, "tensorrt", components=["vae_encoder"], profiles=SIZES, options=EXACT, report=quiet)
    assert folder.parent == Path(bundle.path) / "engines"


def test_an_inspector_that_tells_nothing_is_told_with_the_log(
    bundle: Bundle, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.trt.FakeInspector.get_engine_information", lambda inspector, form: "")
    with pytest.raises(BackendError, match=r"vae_encoder: TensorRT's inspector tells nothing .*no reason given"):
        build(bundle, "tensorrt", components=["vae_encoder"], profiles=SIZES, options=EXACT, report=quiet)
    assert stored(bundle, "tensorrt") == []


@pytest.mark.parametrize("flavour", ["10", "rtx"])
def test_an_engine_whose_weights_are_streamed_is_built_and_run(flavour: str, bundle: Bundle, plug_in: PlugIn) -> None:
    plug_in(flavour)
    backend = "tensorrt-rtx" if flavour == "rtx" else "tensorrt"
    options = BuildOptions(precision="fp32", weight_streaming=True)
    build(bundle, backend, components=["vae_encoder"], profiles=SIZES, options=options, report=quiet)
    (engine,) = stored(bundle, backend)
    assert engine.record.options["weight_streaming"]
    assert engine.record.notes["agreement"]["rows"] > 80


@pytest.mark.parametrize(
    ("flavour", "option", "told"),
    [
        ("8.6", "weight_streaming", "--weight-streaming: tensorrt fake does not have it"),
        ("rtx", "hardware_compatible", "--hardware-compatible: tensorrt-rtx does not have it"),
    ],
)
def test_an_option_that_a_library_lacks_is_refused_before_a_word_is_said(
    flavour: str, option: str, told: str, bundle: Bundle, plug_in: PlugIn
) -> None:
    plug_in(flavour)
    lines: list[str] = []
    options: dict[str, Any] = {option: True}
    backend = "tensorrt-rtx" if flavour == "rtx" else "tensorrt"
    with pytest.raises(UsageError, match=told):
        build(bundle, backend, options=BuildOptions(**options), report=lines.append)
    assert lines == []


@pytest.mark.parametrize(
    ("logged", "told"),
    [
        (
            "CUDA driver version is insufficient for CUDA runtime version",
            "this machine's NVIDIA driver (CUDA 13.0) is older than the library needs; install a newer one to run",
        ),
        ("Target GPU SM 61 is not supported", "it does not run on this GPU"),
    ],
)
def test_an_rtx_engine_that_this_machine_cannot_run_is_kept_unchecked_and_the_reason_told(
    logged: str, told: str, bundle: Bundle, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in("rtx")

    def refuse(runtime: Any, plan: Any) -> None:
        runtime._library.complain(runtime._log, logged)

    monkeypatch.setattr("tests.fakes.trt.FakeRuntime.deserialize_cuda_engine", refuse)
    lines: list[str] = []
    build(bundle, "tensorrt-rtx", components=["vae_encoder"], profiles=SIZES, options=EXACT, report=lines.append)
    (line,) = [line for line in lines if "not checked" in line]
    assert line.startswith(f"vae_encoder: not checked: {told}")
    assert line.endswith(logged)
    (engine,) = stored(bundle, "tensorrt-rtx")
    assert (engine.folder / PLAN).stat().st_size > 0
    assert not {"agreement", "inspected"} & set(engine.record.notes)


def test_a_tensorrt_engine_that_the_gpu_of_its_build_cannot_load_is_not_kept(
    bundle: Bundle, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.trt.FakeRuntime.deserialize_cuda_engine", lambda runtime, plan: None)
    with pytest.raises(BackendError, match="vae_encoder: tensorrt fake cannot load the engine"):
        build(bundle, "tensorrt", components=["vae_encoder"], profiles=SIZES, options=EXACT, report=quiet)
    assert stored(bundle, "tensorrt") == []


def test_of_a_long_log_the_errors_are_kept(gpu: Any) -> None:
    log = TensorRT("tensorrt").log
    log.log(1, "the reason")
    for i in range(5000):
        log.log(4, f"verbose {i}")
    assert log.errors() == "the reason"
    log.clear()
    assert log.errors() == "no reason given"
