"""Several engines in one loop: an output becomes the input of another engine where they compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt import graph
from sdopt.build.fuse_step import CARRIED, fuse_step
from sdopt.bundle.files import Bundle, Component
from sdopt.bundle.specs import Array
from sdopt.engine.ort import OrtEngine
from sdopt.engine.pool import EnginePool
from sdopt.errors import UsageError
from tests.conftest import EMOJI_BUNDLE
from tests.engine.plans import PARTS, stock
from tests.fakes.gpu import Simulator

WIDE = "batch=1:1:4 tokens=1:32:64 height=64 width=64"
OPTIONS: dict[str, Any] = {
    "seed": 3, "num_inference_steps": 8, "guidance_scale": 3.0, "guidance_interval": (0.25, 0.7),
    "sampler": "dpmpp_2m", "height": 64, "width": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Iterator[sdopt.Pipeline]:
    with sdopt.load(EMOJI_BUNDLE, backend="ort:cpu", threads=1, verify=False) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def both_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded bundle with engines of the step with guidance and of the step without it."""
    folder = tmp_path_factory.mktemp("both")
    return stock(EMOJI_BUNDLE, folder / "bundle", [WIDE], (*PARTS, "unet_step_alone"))


@pytest.fixture
def pipe(both_steps: Path, gpu: Simulator) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(both_steps, backend="tensorrt", verify=False) as opened:
        yield opened


def latents(pipe: sdopt.Pipeline, **more: Any) -> Array:
    return pipe("a red apple", output_type="latent", **{**OPTIONS, **more}).images


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "unipc"])
def test_calls_without_guidance_run_the_engine_without_it_and_the_picture_is_the_same(
    sampler: str, pipe: sdopt.Pipeline, reference: sdopt.Pipeline
) -> None:
    found = latents(pipe, sampler=sampler)
    assert {"unet_step", "unet_step_alone"} <= set(pipe.pool.opened)
    np.testing.assert_allclose(found, latents(reference, sampler=sampler), atol=2e-4, rtol=2e-4)


def test_a_picture_without_an_interval_opens_one_engine_of_a_step(pipe: sdopt.Pipeline) -> None:
    latents(pipe, guidance_interval=None)
    assert [name for name in pipe.pool.opened if name.startswith("unet")] == ["unet_step"]


def test_what_one_engine_gives_another_never_visits_the_host(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
    for _ in range(2):  # the first time, plans are loaded and graphs captured
        latents(pipe)
    gpu.calls.clear()
    steps = pipe.denoise("a red apple", **OPTIONS)
    next(steps)
    gpu.calls.clear()
    for _ in range(6):
        next(steps)
    assert set(gpu.calls) <= {"cudaSetDevice", "copy", "launch"}
    assert gpu.calls.count("launch") == 6


def test_steering_reaches_the_engine_that_comes_next(pipe: sdopt.Pipeline, reference: sdopt.Pipeline) -> None:
    def halve(_: sdopt.Pipeline, index: int, timestep: float, data: dict[str, Array]) -> dict[str, Array]:
        return {"latents": data["latents"] / 2} if index in (1, 4) else {}

    found, expected = (latents(p, callback_on_step_end=halve) for p in (pipe, reference))
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)


def test_an_engine_that_gave_to_another_serves_alone_again_and_leaves_nothing(
    pipe: sdopt.Pipeline, reference: sdopt.Pipeline, gpu: Simulator
) -> None:
    for _ in range(2):
        latents(pipe)
        found = latents(pipe, guidance_interval=None)
        np.testing.assert_allclose(found, latents(reference, guidance_interval=None), atol=2e-4, rtol=2e-4)
        pipe.release("unet_step_alone")
    pipe.close()
    assert gpu.leaks() == {}


@pytest.mark.parametrize(
    ("output", "name", "message"),
    [
        ("nosuch", "sample", "unet_step: there is no nosuch to give on; there is denoised, next_history, next_sample"),
        ("sample", "sample", "unet_step: there is no sample to give on"),
        ("next_sample", "denoised", "unet_step_alone: there is no denoised to give on"),
        ("next_history", "sample", r"unet_step gives next_history float32 \[12, 1, 4, 8, 8\]; unet_step_alone takes"),
    ],
)
def test_tensors_that_do_not_fit_are_not_given_on(output: str, name: str, message: str, pipe: sdopt.Pipeline) -> None:
    step, alone = (pipe.engine(component) for component in ("unet_step", "unet_step_alone"))
    runs = [engine.begin(started(engine), {}) for engine in (step, alone)]  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=message):
        runs[0].feed(output, runs[1], name)
    for run in runs:
        run.close()


def started(engine: Any) -> dict[str, Array]:
    sizes = {"batch": 1, "images": 1, "tokens": 32, "latent_height": 8, "latent_width": 8}
    shapes = {spec.name: spec.sized(sizes) for spec in engine.inputs}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_engines_of_onnx_runtime_give_to_each_other_too(tmp_path: Path, reference: sdopt.Pipeline) -> None:
    bundle = Bundle.open(EMOJI_BUNDLE, verify=False)
    given: dict[str, Any] = {}
    for name, guided in (("unet_step", True), ("unet_step_alone", False)):
        model = fuse_step(graph.load(bundle.component("unet").graph), guided=guided)
        inputs, outputs = graph.specs(model)
        graph.save(model, tmp_path / f"{name}.onnx")
        component = Component(name, tmp_path / f"{name}.onnx", inputs, outputs)
        given[name] = OrtEngine(component, threads=1, carry=CARRIED)
    with sdopt.Pipeline(EnginePool(bundle, "ort:cpu", threads=1, given=given)) as pipe:
        np.testing.assert_allclose(latents(pipe), latents(reference), atol=2e-4, rtol=2e-4)
    for engine in given.values():
        engine.close()
