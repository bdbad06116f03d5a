"""Feature caches in engines that make whole steps: the latents are those of the host way, on ONNX Runtime and on a GPU
of NumPy arrays, where deep features go from one engine to the other without the host."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array
from sdopt.cli.main import main
from sdopt.denoise.batch import Batch, job_of
from sdopt.engine.store import stored
from sdopt.errors import BackendError, UsageError
from sdopt.metrics import psnr
from tests.build.test_join_control import silent
from tests.build.test_joined_engines import RTX
from tests.conftest import EMOJI_BUNDLE
from tests.fakes.gpu import Simulator

FLOOR_DB = 80.0
SIZES = ["batch=1:1:4 height=64 width=48:64:96"]
CALL: dict[str, Any] = {
    "prompt": "a cat", "seed": 1, "num_inference_steps": 6, "height": 64, "width": 48, "output_type": "latent",
}  # fmt: skip
STEPS = [f"unet_step_{kind}_{depth}" for depth in (1, 3) for kind in ("deep", "shallow")]


@pytest.fixture(scope="module")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        yield


@pytest.fixture(scope="module")
def host(own_state: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sdopt.Pipeline]:
    folder = Path(shutil.copytree(EMOJI_BUNDLE, tmp_path_factory.mktemp("host") / "bundle"))
    for depth in (1, 3):
        build(Bundle.open(folder, verify=False), "ort", cache_depth=depth, report=silent)
    with sdopt.load(folder, "ort", threads=1, verify=False) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def ort(own_state: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sdopt.Pipeline]:
    folder = Path(shutil.copytree(EMOJI_BUNDLE, tmp_path_factory.mktemp("ort") / "bundle"))
    names = [*STEPS, "unet_step_alone_deep_1", "unet_step_alone_shallow_1"]
    build(Bundle.open(folder, verify=False), "ort", components=names, report=silent)
    with sdopt.load(folder, "ort", threads=1, verify=False) as pipe:
        yield pipe


@pytest.fixture
def engines(own_state: None, gpu: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with float32 engines for the fake TensorRT, built once."""
    path = tmp_path_factory.getbasetemp() / "cached-steps"
    if not path.exists():
        how: dict[str, Any] = {
            "profiles": SIZES,
            "options": BuildOptions(precision="fp32"),
            "report": lambda line: None,
        }
        bundle = Bundle.open(shutil.copytree(EMOJI_BUNDLE, path), verify=False)
        build(bundle, "tensorrt", cache_depth=3, **how)
        build(bundle, "tensorrt", components=["text_encoder"], **how)
    return path


CASES: list[dict[str, Any]] = [
    {"cache_interval": 2, "cache_depth": 3},
    {"cache_schedule": [1, 4], "cache_depth": 3, "sampler": "dpmpp_2m"},
    {"cache_interval": 3, "cache_depth": 3, "guidance_interval": (0.0, 0.6)},
    {"cache_interval": 3, "cache_depth": 3, "guidance_rescale": 0.5, "prompt": ["a cat", "a dog"], "seed": [3, 4]},
    {"cache_interval": 3, "cache_depth": 3, "guidance_scale": 1.0},
]
ON_ORT = [{"cache_interval": 2}, {"cache_interval": 2, "guidance_scale": 1.0, "sampler": "euler_a"}]


def opened(pipe: sdopt.Pipeline) -> set[str]:
    return {name for name in pipe.pool.opened if name.startswith("unet")}


@pytest.mark.parametrize("options", [*CASES, *ON_ORT], ids=str)
def test_steps_on_onnx_runtime_make_the_latents_of_the_host_way(
    options: dict[str, Any], host: sdopt.Pipeline, ort: sdopt.Pipeline
) -> None:
    ort.close()
    expected, made = (pipe(**{**CALL, **options}).images for pipe in (host, ort))
    assert psnr(expected, made) >= FLOOR_DB
    depth = options.get("cache_depth", 1)
    step = "unet_step_alone" if depth == 1 and options.get("guidance_scale") == 1 else "unet_step"
    assert opened(ort) == {f"{step}_deep_{depth}", f"{step}_shallow_{depth}"}


@pytest.mark.parametrize("options", CASES, ids=str)
def test_steps_on_a_gpu_make_the_latents_of_the_host_way(
    options: dict[str, Any], host: sdopt.Pipeline, engines: Path
) -> None:
    with sdopt.load(engines, "tensorrt", verify=False) as pipe:
        assert psnr(host(**{**CALL, **options}).images, pipe(**{**CALL, **options}).images) >= FLOOR_DB


def test_in_half_a_shallow_step_that_reads_no_prompt_stays_near(
    host: sdopt.Pipeline, tmp_path: Path, gpu: Simulator
) -> None:
    bundle = Bundle.open(shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle"), verify=False)
    how: dict[str, Any] = {"profiles": SIZES, "report": silent}
    build(bundle, "tensorrt", cache_depth=1, **how)
    build(bundle, "tensorrt", components=["text_encoder"], **how)
    with sdopt.load(bundle.path, "tensorrt", verify=False) as pipe:
        made = pipe(**CALL, cache_interval=2)
        assert not {"encoder_hidden_states", "negative_encoder_hidden_states"} & {
            spec.name for spec in pipe.engine("unet_step_shallow_1").inputs
        }
    assert 30 < psnr(host(**CALL, cache_interval=2).images, made.images) < 200
    assert made.parameters[0]["precision"].startswith("fp16")


def test_deep_features_never_visit_the_host(engines: Path, gpu: Simulator) -> None:
    options = {**CALL, "cache_interval": 3, "cache_depth": 3}
    options.pop("output_type")
    with sdopt.load(engines, "tensorrt", verify=False) as pipe:
        for _ in range(2):  # plans are loaded and graphs captured
            list(pipe.denoise(**options))
        steps = pipe.denoise(**options)
        next(steps)
        gpu.calls.clear()
        for _ in range(4):
            next(steps)
        assert set(gpu.calls) <= {"cudaSetDevice", "copy", "launch"}
        assert gpu.calls.count("launch") == 4


def test_requests_that_share_launches_are_what_they_are_alone(engines: Path) -> None:
    requests = [
        {"cache_interval": 2}, {"cache_interval": 3, "prompt": "a dog", "num_inference_steps": 5},
        {"cache_schedule": [3], "seed": 9, "sampler": "euler_a"},
    ]  # fmt: skip
    with sdopt.load(engines, "tensorrt", verify=False) as pipe:
        whole = [{**CALL, "cache_depth": 3, **request} for request in requests]
        alone = [pipe(**request).images for request in whole]
        batch, last, index = Batch(), dict[int, Array](), dict[int, int]()
        for i, request in enumerate(whole):
            options = {name: value for name, value in request.items() if name not in ("prompt", "output_type")}
            job = job_of(pipe.prepare(pipe.plan(request["prompt"], **options)))
            index[id(job)] = i
            batch.join(job)
        opened = {name: pipe.pool.open(name) for name in STEPS[2:]}
        while batch.jobs:
            for jobs in batch.groups().values():
                for job, step in batch.advance(jobs, opened):
                    last[index[id(job)]] = np.array(step.sample)  # type: ignore[union-attr]
        batch.close()
    for i, expected in enumerate(alone):
        assert psnr(expected, last[i]) >= FLOOR_DB


def test_a_missing_depth_is_told_with_the_command_that_builds_it(engines: Path) -> None:
    command = f"sdopt build {engines} --backend tensorrt --cache-depth 2"
    with sdopt.load(engines, "tensorrt", verify=False) as pipe, pytest.raises(BackendError, match=f"{command}$"):
        pipe(**CALL, cache_interval=2, cache_depth=2)


WRONG: dict[str, dict[str, Any]] = {
    "--cache-depth 0; allowed is 1 or more": {"cache_depth": 0},
    "--cache-depth 9; allowed are 1 to 6: the up path of this UNet has so many layers": {"cache_depth": 9},
    "--cache-depth and --component": {"cache_depth": 1, "components": ["unet"]},
    "component 'unet_deep': its name has the depth": {"components": ["unet_deep"]},
    "component 'unet_step_deep_1' and adapters: a feature cache": {
        "components": ["unet_step_deep_1"], "adapters": ["silhouette"],
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_built_is_said(message: str, bundle: Bundle, own_folders: Path) -> None:
    with pytest.raises(UsageError) as caught:
        build(bundle, "ort", report=silent, **WRONG[message])
    assert message in str(caught.value)
    assert not stored(bundle, "ort")


@RTX
def test_tensorrt_rtx_builds_both_without_a_gpu(bundle: Bundle, own_folders: Path) -> None:
    words = ["--backend", "tensorrt-rtx", "--cache-depth", "3", "--opt-level", "0", "--profile", *SIZES]
    assert main(["build", str(bundle.path), *words]) == 0
    engines = {engine.record.component: engine.record for engine in stored(bundle, "tensorrt-rtx")}
    assert set(engines) == set(STEPS[2:])
    (deep,) = [spec for spec in engines["unet_step_shallow_3"].inputs if spec.name == "deep"]
    assert deep in engines["unet_step_deep_3"].outputs
    assert deep.shape == (2, "batch", 96, "latent_height_over_2", "latent_width_over_2")
    assert "latent_width_over_2=3:4:6" in str(engines["unet_step_shallow_3"].profiles[0])
