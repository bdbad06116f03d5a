"""On a real GPU: engines that `sdopt build` makes there, against ONNX Runtime on the CPU; skipped elsewhere.

pip install "sdopt[tensorrt,cpu]" && pytest -m gpu
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.options import Options
from sdopt.build.plan import build
from sdopt.bundle import Bundle
from sdopt.engine import Engine, installed_backends, open_engine
from sdopt.engine.cuda import open_cuda
from sdopt.engine.device import shared_device
from sdopt.errors import BackendError
from sdopt.samplers import SAMPLERS
from sdopt.specs import Array
from tests.conftest import EMOJI_BUNDLE
from tests.engine.contract import CONTRACT

pytestmark = pytest.mark.gpu
FLOOR_DB = {"fp32": 45.0, "fp16": 30.0}  # of pictures in 0..1; TF32 is on in float32 engines
OPTIONS: dict[str, Any] = {"seed": 3, "num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "np"}


@pytest.fixture(scope="module")
def backend() -> str:
    try:
        open_cuda()
    except BackendError as error:
        pytest.skip(f"no GPU: {error}")
    found = [name for name in ("tensorrt", "tensorrt-rtx") if name in installed_backends()]
    return found[0] if found else pytest.skip("neither tensorrt nor tensorrt_rtx is installed")


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def built(request: pytest.FixtureRequest, backend: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The embedded bundle with engines of this precision."""
    path = Path(shutil.copytree(EMOJI_BUNDLE, tmp_path_factory.mktemp("gpu") / "bundle"))
    profiles = ["batch=1:1:4 height=64:128:192 width=64:128:192 tokens=1:32:64"]
    options = Options(precision=request.param, opt_level=1)
    names = ["unet", "unet_step", "text_encoder", "vae_decoder", "vae_encoder"]
    build(Bundle.open(path), backend, components=names, profiles=profiles, options=options)
    return path, request.param


@pytest.fixture
def pipe(built: tuple[Path, str], backend: str) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(built[0], backend=backend) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reference() -> Iterator[sdopt.Pipeline]:
    with sdopt.load(EMOJI_BUNDLE, backend="ort:cpu") as pipeline:
        yield pipeline


def psnr(expected: Array, found: Array) -> float:
    return float(-10 * np.log10(np.mean(np.square(expected - found, dtype=np.float64)) + 1e-20))


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda p: p.__name__)
def test_contract(built: tuple[Path, str], backend: str, promise: Any) -> None:
    engine: Engine
    with open_engine(Bundle.open(built[0]), "unet", backend) as engine:
        promise(engine)


@pytest.mark.parametrize("name", [name for name, s in SAMPLERS.items() if s.family == "diffusion"])
def test_every_samplers_picture(
    name: str, pipe: sdopt.Pipeline, reference: sdopt.Pipeline, built: tuple[Path, str]
) -> None:
    options = {**OPTIONS, "sampler": name, "num_images_per_prompt": 2}
    expected, found = (p("a red apple", **options).images for p in (reference, pipe))
    assert psnr(expected, found) >= FLOOR_DB[built[1]]


def test_replaying_the_graph_equals_launching_without_one_bit_for_bit(
    pipe: sdopt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = pipe("a red apple", **OPTIONS).images
    pipe.close()
    monkeypatch.setattr("sdopt.engine.trt_api.Context.capturable", lambda context, stream: False)
    np.testing.assert_array_equal(pipe("a red apple", **OPTIONS).images, replayed)


def test_the_graph_is_there(pipe: sdopt.Pipeline) -> None:
    pipe("a red apple", **OPTIONS)
    engine: Any = pipe.engine("unet_step")
    assert all(lane._graph for lanes in engine._idle.values() for lane in lanes)


def test_a_thousand_pictures_need_no_more_memory_than_one(pipe: sdopt.Pipeline) -> None:
    options = {**OPTIONS, "num_inference_steps": 2}
    for seed in range(3):
        pipe("a red apple", **{**options, "seed": seed})
    free, _ = shared_device().cuda.memory()
    for seed in range(1000):
        pipe("a red apple", **{**options, "seed": seed})
    assert free - shared_device().cuda.memory()[0] < 1 << 20


def test_a_shape_that_comes_back_makes_the_same_picture(pipe: sdopt.Pipeline) -> None:
    shapes: list[dict[str, Any]] = [{}, {"height": 192, "num_images_per_prompt": 4}, {"width": 64}]
    first = [pipe("a red apple", **OPTIONS, **shape).images for shape in shapes]
    for shape, expected in zip(shapes, first, strict=True):
        np.testing.assert_array_equal(pipe("a red apple", **OPTIONS, **shape).images, expected)


def test_two_threads_make_their_own_pictures(pipe: sdopt.Pipeline) -> None:
    def picture(i: int) -> Array:
        return pipe("a red apple", **{**OPTIONS, "seed": i % 2, "width": 128 - 64 * (i % 2)}).images

    expected = [picture(0), picture(1)]
    with ThreadPoolExecutor(2) as pool:
        for i, found in enumerate(pool.map(picture, range(20))):
            np.testing.assert_array_equal(found, expected[i % 2])


def test_previews_and_steering_on_the_device(pipe: sdopt.Pipeline, reference: sdopt.Pipeline) -> None:
    def halve(_: sdopt.Pipeline, index: int, timestep: float, data: dict[str, Array]) -> dict[str, Array]:
        return {"latents": data["latents"] / 2} if index == 3 else {}

    expected, found = (p("a red apple", callback_on_step_end=halve, **OPTIONS).images for p in (reference, pipe))
    assert psnr(expected, found) >= FLOOR_DB["fp16"]
