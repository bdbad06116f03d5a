"""On a real GPU: engines that `sdopt build` makes there, against ONNX Runtime on the CPU; skipped elsewhere.

pip install "sdopt[tensorrt,cpu]" pytest && pytest -m gpu
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bench.cases import floors
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array
from sdopt.engine import Engine, installed_backends, open_engine
from sdopt.engine.cuda import open_cuda
from sdopt.engine.device import shared_device
from sdopt.errors import BackendError, UsageError
from sdopt.metrics import psnr
from sdopt.samplers import SAMPLERS
from tests.adapters.lora_files import shapes, tensors, write
from tests.engine.contract import CONTRACT
from tests.engine.gpu_engines import WAYS, Engines

pytestmark = pytest.mark.gpu
OPTIONS: dict[str, Any] = {"seed": 3, "num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "np"}
RANDOM_FLOOR_DB = {"fp16": 30.0}  # of models with random weights, whose pictures are noise: nothing is smooth in them
Open = Callable[[str], sdopt.Pipeline]


@pytest.fixture(scope="session")
def backend() -> str:
    try:
        open_cuda()
    except BackendError as error:
        pytest.skip(f"no GPU: {error}")
    installed = [name for name in ("tensorrt", "tensorrt-rtx") if name in installed_backends()]
    return installed[0] if installed else pytest.skip("neither tensorrt nor tensorrt_rtx is installed")


@pytest.fixture(scope="session")
def engines(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("gpu"), backend)


@pytest.fixture
def pipe(engines: Engines, backend: str) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(engines("fp16"), backend=backend) as pipeline:
        yield pipeline


@contextmanager
def both(engines: Engines, backend: str, way: str) -> Iterator[tuple[sdopt.Pipeline, sdopt.Pipeline]]:
    """(ONNX Runtime on the CPU, the engines) of one bundle."""
    path = engines(way)
    with sdopt.load(path, backend="ort:cpu") as exact, sdopt.load(path, backend=backend, verify=False) as built:
        yield exact, built


def likeness(engines: Engines, backend: str, way: str, prompt: str = "a red apple", **options: Any) -> float:
    """How near the engines' picture is to ONNX Runtime's, in dB."""
    with both(engines, backend, way) as pipes:
        expected, actual = (p(prompt, **{**OPTIONS, **options}).images for p in pipes)
    return psnr(expected, actual, 1.0)


def floor(way: str) -> float:
    precision = WAYS[way].precision
    return floors("tensorrt", precision)[0] if WAYS[way].model == "emoji" else RANDOM_FLOOR_DB[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("promise", CONTRACT, ids=lambda p: p.__name__)
def test_contract(engines: Engines, backend: str, precision: str, promise: Any) -> None:
    engine: Engine
    with open_engine(Bundle.open(engines(precision)), "unet", backend) as engine:
        promise(engine)


@pytest.mark.parametrize("way", ["fp32", "fp16", "bf16", "static", "two profiles"])
def test_the_picture_of_every_way_to_build(way: str, engines: Engines, backend: str) -> None:
    assert likeness(engines, backend, way) >= floor(way)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", [name for name, s in SAMPLERS.items() if s.family == "diffusion"])
def test_every_samplers_picture(name: str, precision: str, engines: Engines, backend: str) -> None:
    assert likeness(engines, backend, precision, sampler=name, num_images_per_prompt=2) >= floor(precision)


def test_the_second_profile_makes_its_size(engines: Engines, backend: str) -> None:
    size = {"height": 192, "width": 192, "num_images_per_prompt": 4}
    assert likeness(engines, backend, "two profiles", **size) >= floor("two profiles")


def test_a_size_that_was_not_built_is_refused_with_the_command(engines: Engines, backend: str) -> None:
    path = engines("static")
    with sdopt.load(path, backend=backend) as pipeline, pytest.raises(UsageError, match="--profile"):
        pipeline("a red apple", **OPTIONS, height=192)


def test_from_picture_to_picture(engines: Engines, backend: str) -> None:
    assert likeness(engines, backend, "fp16", image=painting(128), strength=0.6) >= floor("fp16")


def test_inpainting_with_four_channels(engines: Engines, backend: str) -> None:
    options = {"image": painting(128), "mask_image": half_mask(128)}
    assert likeness(engines, backend, "fp16", **options) >= floor("fp16")


def test_inpainting_with_nine_channels(engines: Engines, backend: str) -> None:
    edge = Bundle.open(engines("nine channels")).manifest.defaults.height
    options = {"image": painting(edge), "mask_image": half_mask(edge), "num_inference_steps": 3}
    assert likeness(engines, backend, "nine channels", "apple", **options) >= floor("nine channels")


@pytest.mark.parametrize("way", ["sd15", "sdxl"])
def test_the_other_models(way: str, engines: Engines, backend: str) -> None:
    assert likeness(engines, backend, way, "apple", num_inference_steps=2) >= floor(way)


@pytest.mark.parametrize("way", ["refit fp32", "refit fp16", "refit bf16", "refit all"])
def test_from_one_lora_to_another_and_back(way: str, engines: Engines, backend: str, tmp_path: Path) -> None:
    path = engines(way)
    bundle = Bundle.open(path)
    modules = {name: shapes(bundle, name) for name in ("unet", "text_encoder")}
    modules["text_encoder"].pop("text_projection", None)
    files = [write(tmp_path / f"{i}.safetensors", tensors(modules, seed=i, size=0.1)) for i in range(2)]
    with both(engines, backend, way) as (exact, built):
        plain = built("a red apple", **OPTIONS).images
        for pipe in (exact, built):
            for i, file in enumerate(files):
                pipe.load_lora_weights(file, f"{i}")
        first: dict[str, Array] = {}
        for name in ("0", "1", "0"):
            exact.set_adapters(name)
            built.set_adapters(name)
            expected, actual = (pipe("a red apple", **OPTIONS).images for pipe in (exact, built))
            assert psnr(expected, actual, 1.0) >= floor(way)
            assert psnr(plain, actual, 1.0) < psnr(expected, actual, 1.0) - 3
            np.testing.assert_array_equal(actual, first.setdefault(name, actual))
        built.unload_lora_weights()
        np.testing.assert_array_equal(built("a red apple", **OPTIONS).images, plain)


def test_replaying_the_graph_equals_launching_without_one_bit_for_bit(
    pipe: sdopt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = pipe("a red apple", **OPTIONS).images
    pipe.close()
    monkeypatch.setattr("sdopt.engine.trt_api.Context.capturable", lambda context, stream: False)
    np.testing.assert_array_equal(pipe("a red apple", **OPTIONS).images, replayed)


def test_every_loop_is_one_graph_a_step(pipe: sdopt.Pipeline, messages: list[str]) -> None:
    pipe("a red apple", **OPTIONS)
    assert not [line for line in messages if "no CUDA graph" in line]


def test_hundreds_of_pictures_need_no_more_memory_than_one(pipe: sdopt.Pipeline) -> None:
    options = {**OPTIONS, "num_inference_steps": 2}
    for seed in range(3):
        pipe("a red apple", **{**options, "seed": seed})
    free, _ = shared_device().cuda.memory()
    for seed in range(300):
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
        for i, actual in enumerate(pool.map(picture, range(20))):
            np.testing.assert_array_equal(actual, expected[i % 2])


def test_steering_on_the_device(engines: Engines, backend: str) -> None:
    def halve(_: sdopt.Pipeline, index: int, timestep: float, data: dict[str, Array]) -> dict[str, Array]:
        return {"latents": data["latents"] / 2} if index == 3 else {}

    assert likeness(engines, backend, "fp16", callback_on_step_end=halve) >= floor("fp16")


def painting(edge: int) -> Array:
    """A picture with slopes and edges, [edge, edge, 3] in 0..1."""
    y, x = np.mgrid[0:edge, 0:edge] / edge
    return np.stack([x, y, (x + y > 1).astype(float)], -1).astype(np.float32)


def half_mask(edge: int) -> Array:
    """White in the left half, [edge, edge]."""
    mask = np.zeros((edge, edge), np.float32)
    mask[:, : edge // 2] = 1
    return mask
