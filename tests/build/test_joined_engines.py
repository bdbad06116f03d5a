"""Engines with ControlNets inside, for TensorRT: built and run on the fake GPU, and built for real by TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.files import Bundle
from sdopt.cli.loras import overlay_of
from sdopt.cli.main import main
from sdopt.engine.refit import REFIT, Refittable
from sdopt.engine.store import stored
from sdopt.errors import BackendError, UsageError
from sdopt.metrics import psnr
from tests.adapters.lora_files import shapes, tensors, write
from tests.adapters.nets import edges
from tests.build.test_join_control import CALL, CASES, FLOOR_DB, ONE, controlled, latents, silent
from tests.conftest import PlugIn
from tests.fakes.gpu import Simulator

__all__ = ["controlled"]  # a fixture
SIZES = ["batch=1:1:2 height=24 width=32"]
EXACT = BuildOptions(precision="fp32")
BESIDE = ("text_encoder", "vae_encoder")
RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "sdopt[tensorrt-rtx]"',
)


@pytest.fixture(scope="module")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        yield


@pytest.fixture
def engines(controlled: Path, own_state: None, gpu: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with float32 engines for the fake TensorRT, built once: the plain step and two with ControlNets."""
    path = tmp_path_factory.getbasetemp() / "joined-engines"
    if not path.exists():
        shutil.copytree(controlled, path)
        names = ("unet_step", "unet_step.canny", "unet_step.canny.pose", *BESIDE)
        build(Bundle.open(path), "tensorrt", components=names, profiles=SIZES, options=EXACT, report=silent)
    return path


@pytest.fixture(scope="module")
def host(controlled: Path) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(controlled, "ort") as pipe:
        yield pipe


@pytest.mark.parametrize("case", ["one", "guess", "start and end", "two", "a picture for each", "inpaint"])
def test_engines_with_nets_make_the_latents_of_the_host_way(case: str, engines: Path, host: sdopt.Pipeline) -> None:
    with sdopt.load(engines, "tensorrt") as pipe:
        assert psnr(latents(host, **CASES[case]), latents(pipe, **CASES[case])) >= FLOOR_DB


@pytest.mark.parametrize("case", ["one", "start and end", "two"])
def test_residuals_never_visit_the_host(case: str, engines: Path, gpu: Simulator) -> None:
    with sdopt.load(engines, "tensorrt") as pipe:
        options = {**CALL, **CASES[case]}
        options.pop("output_type")
        latents(pipe, **CASES[case])  # plans are loaded and graphs captured
        latents(pipe, **CASES[case])
        steps = pipe.denoise(**options)
        next(steps)
        gpu.calls.clear()
        for _ in range(3):
            next(steps)
        assert set(gpu.calls) <= {"cudaSetDevice", "copy", "launch"}
        assert gpu.calls.count("launch") == 3


def test_a_missing_engine_is_named_with_the_command_that_builds_it(engines: Path, capsys: Any) -> None:
    bundle = Bundle.open(engines)
    with sdopt.load(engines, "tensorrt") as pipe:
        with pytest.raises(BackendError) as caught:
            latents(pipe, control_image={"pose": edges()})
        command = f"sdopt build {engines} --backend tensorrt --component unet_step.pose"
        assert f"no tensorrt engine of unet_step.pose. Build it: {command}" in str(caught.value)
        assert main([*command.split()[1:], "--precision", "fp32", "--profile", *SIZES]) == 0
        (built,) = (engine for engine in stored(bundle, "tensorrt") if engine.record.component == "unet_step.pose")
        assert Path(capsys.readouterr().out.strip()) == built.folder
    with sdopt.load(engines, "tensorrt") as pipe:
        latents(pipe, control_image={"pose": edges()})
    shutil.rmtree(built.folder)


def test_another_size_is_told_in_pixels(engines: Path) -> None:
    with sdopt.load(engines, "tensorrt") as pipe, pytest.raises(UsageError) as caught:
        latents(pipe, control_image=ONE, height=32)
    assert "--component unet_step.canny" in str(caught.value)
    assert "height=24:24:32" in str(caught.value)


def test_a_net_that_was_exported_again_makes_the_engine_stale(engines: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(engines, tmp_path / "bundle"))
    nets = copy / "adapters"
    shutil.copytree(nets / "pose", nets / "canny", dirs_exist_ok=True)
    with sdopt.load(copy, "tensorrt") as pipe, pytest.raises(BackendError) as caught:
        latents(pipe, control_image=ONE)
    told = str(caught.value)
    assert "the tensorrt engine of unet_step.canny is stale: " in told
    assert "adapters/canny/controlnet.onnx.data is another file" in told
    assert "--component unet_step.canny" in told.partition("Build it: ")[2]
    lines: list[str] = []
    how: dict[str, Any] = {"profiles": SIZES, "options": EXACT, "report": lines.append}
    build(Bundle.open(copy), "tensorrt", components=["unet_step"], adapters=["canny"], **how)
    assert any("built again, because adapters/canny/" in line for line in lines)
    with sdopt.load(copy, "tensorrt") as pipe:
        latents(pipe, control_image=ONE)
    with sdopt.load(copy, "tensorrt") as pipe:  # plain pictures need no net
        shutil.rmtree(nets)
        latents(pipe)


def test_a_lora_changes_the_unet_and_not_the_nets(controlled: Path, tmp_path: Path, plug_in: PlugIn) -> None:
    bundle = Bundle.open(shutil.copytree(controlled, tmp_path / "bundle"))
    lora = write(tmp_path / "a.safetensors", tensors({"unet": shapes(bundle, "unet")}, size=0.1))
    with sdopt.load(controlled, "ort") as pipe:
        plain = latents(pipe, control_image=ONE)
        pipe.load_lora_weights(lora)
        expected = latents(pipe, control_image=ONE)
    assert psnr(plain, expected) < 50
    how: dict[str, Any] = {"profiles": SIZES, "report": silent}
    for flavour in ("10", "10.0"):  # the weights of a LoRA alone can be changed, or all
        plug_in(flavour)
        how["options"] = BuildOptions(precision="fp32", refit="lora")
        build(bundle, "tensorrt", components=["unet_step.canny", *BESIDE], **how)
        engine = next(e for e in stored(bundle, "tensorrt") if e.record.component == "unet_step.canny")
        assert engine.record.notes["agreement"]["refitted"] > FLOOR_DB
        assert not any("canny" in name for name in Refittable.read(engine.folder / REFIT).weights)
        with sdopt.load(bundle.path, "tensorrt") as pipe:
            assert psnr(plain, latents(pipe, control_image=ONE)) >= FLOOR_DB
            pipe.load_lora_weights(lora)
            assert psnr(expected, latents(pipe, control_image=ONE)) >= FLOOR_DB
        shutil.rmtree(bundle.path / "engines")
    how["options"] = EXACT
    names = ("unet_step.canny", *BESIDE)
    build(bundle, "tensorrt", components=names, overlay=overlay_of(bundle, [f"{lora}:1"]), **how)  # built in
    with sdopt.load(bundle.path, "tensorrt") as pipe:
        pipe.load_lora_weights(lora)
        assert psnr(expected, latents(pipe, control_image=ONE)) >= FLOOR_DB


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_the_picture_and_the_scales_stay_float32(
    precision: str, controlled: Path, tmp_path: Path, own_folders: Path, gpu: Simulator, host: sdopt.Pipeline
) -> None:
    bundle = Bundle.open(shutil.copytree(controlled, tmp_path / "bundle"))
    build(
        bundle, "tensorrt", components=["unet_step.canny.pose", *BESIDE], profiles=SIZES,
        options=BuildOptions(precision=precision), report=silent,
    )  # fmt: skip
    engine = next(e for e in stored(bundle, "tensorrt") if e.record.component == "unet_step.canny.pose")
    inputs = {spec.name: spec for spec in engine.record.inputs}
    assert {spec.dtype for spec in inputs.values()} == {"float32"}
    assert inputs["control_image.canny"].shape == ("batch", 3, "height", "width")
    assert "negative_conditioning_scale.pose" in inputs
    assert "negative_control_image.pose" not in inputs
    with sdopt.load(bundle.path, "tensorrt") as pipe:
        assert psnr(latents(host, **CASES["two"]), latents(pipe, **CASES["two"])) > 30


WRONG: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "has no adapter 'cany'; there are canny": (None, ("cany",)),
    "has no adapter 'x'": (("unet_step.x",), ()),
    "component 'unett.canny': this bundle becomes ": (("unett.canny",), ()),
    "component 'vae_decoder.canny': only an engine of a step is steered by adapters": (("vae_decoder.canny",), ()),
    "--adapter: none of text_encoder is steered by an adapter": (("text_encoder",), ("canny",)),
    "--adapter and --component unet_step.pose, which names its adapters": (("unet_step.pose",), ("canny",)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_said(message: str, controlled: Path) -> None:
    components, adapters = WRONG[message]
    with pytest.raises(UsageError) as caught:
        build(Bundle.open(controlled), "ort", components=components, adapters=adapters, report=silent)
    assert message in str(caught.value)


@RTX
def test_tensorrt_rtx_builds_it_without_a_gpu(controlled: Path, tmp_path: Path, own_folders: Path) -> None:
    copy = Path(shutil.copytree(controlled, tmp_path / "bundle"))
    words = ["--backend", "tensorrt-rtx", "--component", "unet_step", "--opt-level", "0", "--profile", *SIZES]
    assert main(["build", str(copy), *words, "--control", "pose", "--control", "canny"]) == 0
    (engine,) = stored(Bundle.open(copy), "tensorrt-rtx")
    assert engine.record.component == "unet_step.canny.pose"
    assert engine.record.notes["layers"]["HALF"] > 3 * engine.record.notes["layers"].get("FLOAT", 0)
    assert str(engine.record.profiles[0]).endswith("height=24 width=32 latent_height=12 latent_width=16")
    assert json.dumps(engine.record.rebuild_command).count("canny") == 1
