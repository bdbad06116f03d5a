"""Engines of a step that T2I-Adapters and IP-Adapters steer give what their pictures give on the host."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.bundle.adapter import COMPONENTS
from sdopt.bundle.files import Bundle
from sdopt.cli.main import main
from sdopt.engine.store import stored
from sdopt.errors import BackendError, UsageError
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from tests import tiny
from tests.adapters import relatives
from tests.adapters.nets import edges
from tests.build.test_join_control import CALL, FLOOR_DB, added, controlled, latents, silent, steps_of
from tests.build.test_joined_engines import BESIDE, EXACT, RTX, SIZES
from tests.fakes.gpu import Simulator

__all__ = ["controlled"]  # a fixture
FACE, STYLE = edges(40, 31), edges(20, 33, seed=9)
EVERY = ("canny", "depth", "face", "style")
LAYOUTS = {"face": "base", "style": "plus"}
IP, T2I = "unet_step+ip_adapter", "unet_step+t2i_adapter"


def with_adapters(checkpoint: Path, bundle: Path, folder: Path, *prompts: str, **changes: Any) -> Path:
    """A copy of a bundle with a T2I-Adapter and these IP-Adapters, which have two layouts."""
    own = Path(shutil.copytree(bundle, folder / "bundle"))
    added(own, relatives.t2i_adapter(**{"seed": 5, "channels": [12, 28], **changes}), folder, "depth")
    tiny.image_encoder(folder / "image_encoder")
    for seed, name in enumerate(prompts):
        file = tiny.ip_adapter(folder / f"{name}.safetensors", checkpoint, LAYOUTS[name], seed)
        add_adapter(file, own, name, verify=False, report=silent)
    return own


@pytest.fixture(scope="module")
def steered(tiny_checkpoint: Path, controlled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with adapters of every kind, without engines."""
    return with_adapters(tiny_checkpoint, controlled, tmp_path_factory.mktemp("steered"), *LAYOUTS)


@pytest.fixture(scope="module")
def pipes(steered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """The host way, and engines for some of the ways in which adapters steer."""
    copy = Path(shutil.copytree(steered, tmp_path_factory.mktemp("engines") / "built"))
    for names in ((), ("face",), ("depth",), EVERY):
        build(Bundle.open(copy), "ort", components=["unet_step"], adapters=names, report=silent)
    with sdopt.load(steered, "ort") as host, sdopt.load(copy, "ort") as pipe:
        yield host, pipe


BOTH = {"face": FACE, "style": [STYLE, FACE, FACE]}  # 4 tokens, and 18
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "picture": ({"ip_adapter_image": {"face": FACE}, "ip_adapter_scale": 0.7}, {IP}),
    "no guidance": ({"ip_adapter_image": {"style": FACE}, "guidance_scale": 1.0}, {IP}),
    "two": ({"ip_adapter_image": BOTH, "ip_adapter_scale": [0.7, {"down": 0.4, "mid": [1.2]}]}, {IP}),
    "img2img": ({"ip_adapter_image": {"face": FACE}, "image": edges(seed=7), "strength": 0.7}, {IP}),
    "images": ({"ip_adapter_image": {"face": FACE}, "prompt": ["apple", "a"], "seed": [3, 4]}, {IP}),
    "features": ({"control_image": {"depth": edges()}, "adapter_conditioning_scale": 0.8}, {T2I}),
    "features at first": (
        {"control_image": {"depth": edges()}, "adapter_conditioning_factor": 0.5},
        {T2I, "unet_step"},
    ),
    "all": (
        {"control_image": {"canny": edges(), "depth": edges(seed=3)}, "ip_adapter_image": BOTH},
        {"unet_step.canny+ip_adapter+t2i_adapter"},
    ),
    "all, with ends": (
        {
            "control_image": {"canny": edges(), "depth": edges(seed=3)},
            "ip_adapter_image": BOTH,
            "control_guidance_end": 0.5,
            "adapter_conditioning_factor": 0.7,
        },
        {"unet_step.canny+ip_adapter+t2i_adapter", IP},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_engines_make_the_latents_of_the_host_way(case: str, pipes: tuple[Any, Any]) -> None:
    host, pipe = pipes
    pipe.close()
    options, engines = CASES[case]
    expected, given = latents(host, **options), latents(pipe, **options)
    assert psnr(expected, given) >= FLOOR_DB
    unsteered = {name: option for name, option in options.items() if "adapter" not in name and "control" not in name}
    assert psnr(expected, latents(host, **unsteered)) < 50  # they matter
    assert steps_of(pipe) == engines


def test_features_of_sdxl_are_added_where_both_halves_are_one(
    sdxl_checkpoint: Path, sdxl_bundle: Path, tmp_path: Path
) -> None:
    """The first block of its UNet reads no prompt."""
    kind: dict[str, Any] = {"adapter_type": "full_adapter_xl", "downscale_factor": 4}
    bundle = with_adapters(sdxl_checkpoint, sdxl_bundle, tmp_path, "face", **kind)
    copy = Path(shutil.copytree(bundle, tmp_path / "built"))
    names = [IP, T2I, "unet_step_alone+t2i_adapter"]
    build(Bundle.open(copy), "ort", components=names, report=silent)
    with sdopt.load(bundle, "ort") as host, sdopt.load(copy, "ort") as pipe:
        for case in ("picture", "features"):
            assert psnr(latents(host, **CASES[case][0]), latents(pipe, **CASES[case][0])) >= FLOOR_DB
        options = {**CASES["features"][0], "guidance_interval": (0.25, 0.7)}
        assert psnr(latents(host, **options), latents(pipe, **options)) >= FLOOR_DB
        assert steps_of(pipe) == set(names)


# ---- TensorRT


@pytest.fixture(scope="module")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        yield


@pytest.fixture
def engines(steered: Path, own_state: None, gpu: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with float32 engines for the fake TensorRT, built once."""
    path = tmp_path_factory.getbasetemp() / "steered-engines"
    if not path.exists():
        shutil.copytree(steered, path)
        names = [*BESIDE, "unet_step", IP, "unet_step.canny+ip_adapter+t2i_adapter"]
        names += [f"adapters/{name}/{part}" for name in LAYOUTS for part in COMPONENTS["ip_adapter"]]
        names.append("adapters/depth/t2i_adapter")
        build(Bundle.open(path), "tensorrt", components=names, profiles=SIZES, options=EXACT, report=silent)
    return path


@pytest.mark.parametrize("case", ["picture", "no guidance", "two", "all, with ends"])
def test_on_a_gpu_nothing_but_launches_happens_between_steps(
    case: str, engines: Path, gpu: Simulator, pipes: tuple[Any, Any]
) -> None:
    options = CASES[case][0]
    with sdopt.load(engines, "tensorrt") as pipe:
        assert psnr(latents(pipes[0], **options), latents(pipe, **options)) >= FLOOR_DB
        latents(pipe, **options)  # graphs are captured
        call = {name: option for name, option in {**CALL, **options}.items() if name != "output_type"}
        steps = pipe.denoise(**call)
        next(steps)
        gpu.calls.clear()
        for _ in range(3):
            next(steps)
        assert set(gpu.calls) <= {"cudaSetDevice", "copy", "launch"}
        assert gpu.calls.count("launch") == 3


def test_one_command_builds_all_that_an_adapter_needs(
    engines: Path, steered: Path, tmp_path: Path, gpu: Simulator
) -> None:
    """Where nothing is built, and where only the engines of plain pictures are."""
    many = {"face": [FACE] * 5}
    with sdopt.load(steered, "tensorrt") as pipe, pytest.raises(BackendError) as nothing:
        latents(pipe, ip_adapter_image=many, control_image={"canny": edges()})
    profile = '--profile "batch=1:1:4 height=24 width=32 pictures=1:1:5"'
    assert str(nothing.value).endswith(f"--backend tensorrt --adapter canny --adapter face {profile}")
    copy = Path(shutil.copytree(steered, tmp_path / "bundle"))
    build(Bundle.open(copy), "tensorrt", components=BESIDE, profiles=SIZES, options=EXACT, report=silent)
    options: dict[str, Any] = {"ip_adapter_image": {"face": FACE}, "control_image": {"canny": edges()}}
    with sdopt.load(copy, "tensorrt") as pipe:
        with pytest.raises(BackendError) as some:
            latents(pipe, **options)
        parts = ("adapters/face/image_encoder", "adapters/face/image_projection", "unet_step.canny+ip_adapter")
        assert f"no tensorrt engines of {', '.join(parts)}. Build them: " in str(some.value)
        words = shlex.split(str(some.value).partition("Build them: sdopt ")[2])
        assert main([*words, "--precision", "fp32", "--profile", *SIZES]) == 0
        assert latents(pipe, **options).shape == (1, 4, 12, 16)
    assert {engine.record.component for engine in stored(Bundle.open(copy), "tensorrt")} == {*BESIDE, *parts}


def test_more_pictures_than_an_engine_takes_are_told_as_they_are_typed(engines: Path) -> None:
    with sdopt.load(engines, "tensorrt") as pipe:
        with pytest.raises(UsageError, match=r"face/image_projection --profile \".* pictures=1:1:5\""):
            latents(pipe, ip_adapter_image={"face": [FACE] * 5})
        with pytest.raises(UsageError, match=r"--component unet_step\+ip_adapter --profile \".* height=24:24:32"):
            latents(pipe, ip_adapter_image={"face": FACE}, height=32)
        with pytest.raises(UsageError, match=r"--component adapters/depth/t2i_adapter --profile \".* height=24:24:32"):
            latents(pipe, control_image={"depth": edges(), "canny": edges()}, ip_adapter_image=BOTH, height=32)


def test_an_adapter_that_was_exported_again_makes_its_own_engines_stale(engines: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(engines, tmp_path / "bundle"))
    shutil.rmtree(copy / "adapters/face")
    shutil.copytree(copy / "adapters/style", copy / "adapters/face")
    with sdopt.load(copy, "tensorrt") as pipe:
        with pytest.raises(BackendError, match=r"image_encoder is stale: adapters/face/.* is another file"):
            latents(pipe, ip_adapter_image={"face": FACE})
        latents(pipe, ip_adapter_image={"style": FACE})  # the step is the same for every IP-Adapter


WRONG: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "has no adapter 'fase'; there are ": (None, ("fase",)),
    "component 'adapters/face/encoder': there are": (("adapters/face/encoder",), ()),
    "component 'adapters/canny/controlnet': canny runs inside of a step; give --adapter canny": (
        ("adapters/canny/controlnet",),
        (),
    ),
    "depth is no ControlNet, but a t2i_adapter; its engine is called unet_step+t2i_adapter": (("unet_step.depth",), ()),
    "+ipadapter: an engine takes what adapters of a kind give; there are ip_adapter": (("unet_step+ipadapter",), ()),
    "component 'vae_decoder+ip_adapter': only an engine of a step": (("vae_decoder+ip_adapter",), ()),
    "--adapter and --component unet_step+ip_adapter, which names its adapters": (("unet_step+ip_adapter",), ("canny",)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_said(message: str, steered: Path) -> None:
    components, adapters = WRONG[message]
    with pytest.raises(UsageError) as caught:
        build(Bundle.open(steered), "ort", components=components, adapters=adapters, report=silent)
    assert message in str(caught.value)


def test_a_bundle_without_what_an_adapter_needs_says_so(steered: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(steered, tmp_path / "bundle"))
    for name in LAYOUTS:
        shutil.rmtree(copy / "adapters" / name)
    with pytest.raises(UsageError, match=r"\+ip_adapter: .* has no IP-Adapter; add one: sdopt export IP_ADAPTER"):
        build(Bundle.open(copy), "ort", components=["unet_step+ip_adapter"], report=silent)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["components"]["unet_controlled"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="has no component unet_controlled: .* Export the checkpoint again"):
        build(Bundle.open(copy, verify=False), "ort", components=["unet_step"], adapters=["depth"], report=silent)


@RTX
def test_tensorrt_rtx_builds_them_without_a_gpu(steered: Path, tmp_path: Path, own_folders: Path) -> None:
    copy = Path(shutil.copytree(steered, tmp_path / "bundle"))
    words = ["--backend", "tensorrt-rtx", "--opt-level", "0", "--precision", "fp16", "--profile", *SIZES]
    parts = ["unet_step.canny+ip_adapter+t2i_adapter", "adapters/depth/t2i_adapter"]
    parts += [f"adapters/style/{name}" for name in COMPONENTS["ip_adapter"]]
    assert main(["build", str(copy), *words, *(word for part in parts for word in ("--component", part))]) == 0
    assert {engine.record.component for engine in stored(Bundle.open(copy), "tensorrt-rtx")} == {*parts}
