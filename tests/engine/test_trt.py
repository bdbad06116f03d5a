"""TensorRT engines on a GPU of NumPy arrays: the contract, the fused loop, shapes, threads, memory and what can go wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle import Bundle
from sdopt.engine import Engine, device, open_engine
from sdopt.engine.cuda import LostContextError, OutOfMemoryError
from sdopt.engine.device import Device
from sdopt.errors import BackendError, NumericsError, UsageError
from sdopt.samplers import SAMPLERS
from sdopt.specs import Array, Profile
from tests.conftest import EMOJI_BUNDLE
from tests.engine.contract import CONTRACT, unet_inputs
from tests.engine.fake_gpu import FakeCuda, fake_tensorrt
from tests.engine.plans import stock

WIDE = "batch=1:1:4 tokens=1:32:64 height=8:128:256 width=8:128:256"


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded bundle with an engine of every component for the fake TensorRT, float32, the UNet fused and alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield stock(EMOJI_BUNDLE, tmp_path_factory.mktemp("stocked") / "bundle", [WIDE])


@pytest.fixture(params=[True, False], ids=["10", "8.6"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return plug_in(monkeypatch, modern=request.param)


def plug_in(monkeypatch: pytest.MonkeyPatch, modern: bool = True, total: int = 1 << 30) -> FakeCuda:
    fake = FakeCuda(total)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(fake, modern))
    monkeypatch.setitem(device._devices, 0, Device(fake))
    return fake


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return plug_in(monkeypatch)


@pytest.fixture
def pipe(stocked: Path, gpu: FakeCuda) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(stocked, backend="tensorrt") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reference() -> Iterator[sdopt.Pipeline]:
    with sdopt.load(EMOJI_BUNDLE, backend="ort:cpu", threads=1) as pipeline:
        yield pipeline


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda p: p.__name__)
def test_contract(stocked: Path, cuda: FakeCuda, promise: Callable[[Engine], None]) -> None:
    with open_engine(Bundle.open(stocked, verify=False), "unet", "tensorrt") as engine:
        promise(engine)


def test_a_closed_engine_refuses_to_be_called_and_gives_all_memory_back(stocked: Path, gpu: FakeCuda) -> None:
    engine = open_engine(Bundle.open(stocked, verify=False), "unet", "tensorrt")
    engine(**unet_inputs(engine))
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine(**unet_inputs(engine))
    assert device.shared_device().held.keys() == {device.SCRATCH}
    assert len(gpu.blocks) == 1
    assert not gpu.pinned_blocks


OPTIONS: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_fused_loop_makes_what_the_loop_in_numpy_makes(
    name: str, pipe: sdopt.Pipeline, reference: sdopt.Pipeline
) -> None:
    options = {**OPTIONS, "sampler": name, "num_images_per_prompt": 2}
    expected = reference("a red apple", **options).images
    np.testing.assert_allclose(pipe("a red apple", **options).images, expected, atol=2e-4, rtol=2e-4)


def test_the_host_waits_for_nothing_between_steps(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    pipe("a red apple", **OPTIONS)  # captures the graph
    steps = pipe.denoise("a red apple", seed=1, num_inference_steps=6, sampler="euler_a")
    next(steps)
    gpu.calls.clear()
    for _ in range(5):
        next(steps)
    assert [c for c in gpu.calls if c != "use"] == ["upload", "copy", "launch"] * 5  # noise, row, graph
    gpu.calls.clear()
    steps = pipe.denoise("a red apple", seed=1, num_inference_steps=6, sampler="euler")
    next(steps)
    gpu.calls.clear()
    for _ in range(5):
        next(steps)
    assert [c for c in gpu.calls if c != "use"] == ["copy", "launch"] * 5


def test_one_graph_serves_all_samplers_and_step_counts(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    pipe("a red apple", **OPTIONS)
    gpu.calls.clear()
    for sampler, steps in (("euler", 2), ("dpmpp_2m", 3), ("lcm", 1)):
        pipe("a cat", seed=1, num_inference_steps=steps, sampler=sampler)
    assert "capture" not in gpu.calls
    assert "malloc" not in gpu.calls
