"""TensorRT engines on a GPU of NumPy arrays: the contract, the fused loop, shapes, threads, memory, failures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    """The embedded bundle with float32 engines for the fake TensorRT, of the UNet fused and alone."""
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


SMALL: dict[str, Any] = {"height": 64, "width": 64}
OPTIONS: dict[str, Any] = {
    "seed": 3, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "height": 64, "width": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, s in SAMPLERS.items() if s.family == "diffusion"])
def test_the_fused_loop_makes_what_the_loop_in_numpy_makes(
    name: str, pipe: sdopt.Pipeline, reference: sdopt.Pipeline
) -> None:
    options = {**OPTIONS, "sampler": name}
    expected = reference("a red apple", **options).images
    np.testing.assert_allclose(pipe("a red apple", **options).images, expected, atol=2e-4, rtol=2e-4)


def test_the_host_waits_for_nothing_between_steps(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    pipe("a red apple", **OPTIONS)  # captures the graph
    steps = pipe.denoise("a red apple", seed=1, num_inference_steps=6, sampler="euler_a", **SMALL)
    next(steps)
    gpu.calls.clear()
    for _ in range(5):
        next(steps)
    assert [c for c in gpu.calls if c != "use"] == ["upload", "copy", "launch"] * 5  # noise, row, graph
    gpu.calls.clear()
    steps = pipe.denoise("a red apple", seed=1, num_inference_steps=6, sampler="euler", **SMALL)
    next(steps)
    gpu.calls.clear()
    for _ in range(5):
        next(steps)
    assert [c for c in gpu.calls if c != "use"] == ["copy", "launch"] * 5


def test_one_graph_serves_all_samplers_and_step_counts(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    pipe("a red apple", **{**OPTIONS, "sampler": "euler_a"})
    gpu.calls.clear()
    for sampler, steps in (("euler", 2), ("dpmpp_2m", 3), ("lcm", 1)):
        pipe("a cat", **{**OPTIONS, "num_inference_steps": steps, "sampler": sampler})
    assert "capture" not in gpu.calls
    assert "malloc" not in gpu.calls


def test_previews_are_fetched_only_when_asked_for_and_are_those_of_the_numpy_loop(
    pipe: sdopt.Pipeline, reference: sdopt.Pipeline, gpu: FakeCuda
) -> None:
    options = _denoise()
    expected = list(reference.denoise("a red apple", **options))
    steps = []
    for k, step in enumerate(pipe.denoise("a red apple", **options)):
        gpu.calls.clear()
        if k % 2:
            np.testing.assert_allclose(step.denoised, expected[k].denoised, atol=2e-4)
            np.testing.assert_allclose(step.sample, expected[k].sample, atol=2e-4)
        assert gpu.calls.count("download") == (2 if k % 2 else 0)
        steps.append(step)
    np.testing.assert_array_equal(steps[1].sample, steps[1].sample)
    np.testing.assert_allclose(steps[-1].sample, expected[-1].sample, atol=2e-4)
    with pytest.raises(UsageError, match="step 1 of 4: its data was on the GPU until the next step"):
        _ = steps[0].sample


def test_a_loop_that_is_left_keeps_its_last_step_and_the_engine_serves_the_next(pipe: sdopt.Pipeline) -> None:
    whole = pipe("a red apple", **OPTIONS).images
    for step in pipe.denoise("a red apple", **_denoise()):
        if step.index == 1:
            break
    other = pipe("a cat", **OPTIONS).images
    assert np.isfinite(step.sample).all()
    assert not np.array_equal(other, step.sample)
    np.testing.assert_array_equal(pipe("a red apple", **OPTIONS).images, whole)


def _denoise() -> dict[str, Any]:
    return {k: v for k, v in OPTIONS.items() if k != "output_type"}


def test_writing_into_a_sample_steers_the_fused_loop_as_it_does_the_other(
    pipe: sdopt.Pipeline, reference: sdopt.Pipeline
) -> None:
    def halve(_: sdopt.Pipeline, index: int, timestep: float, data: dict[str, Array]) -> dict[str, Array]:
        return {"latents": data["latents"] / 2} if index == 1 else {}

    found, expected = (p("a red apple", callback_on_step_end=halve, **OPTIONS).images for p in (pipe, reference))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert not np.allclose(found, pipe("a red apple", **OPTIONS).images, atol=2e-2)


def test_inpainting_with_a_mask_holds_what_it_keeps(pipe: sdopt.Pipeline, reference: sdopt.Pipeline) -> None:
    image, mask = np.full((64, 64, 3), 0.3, np.float32), np.zeros((64, 64), np.float32)
    mask[:, 32:] = 1
    options = {**OPTIONS, "image": image, "mask_image": mask, "strength": 0.9}
    found, expected = (p("a red apple", **options).images for p in (pipe, reference))
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [{"guidance_scale": 1.0}, {"guidance_interval": (0.3, 0.8)}, {"guidance_rescale": 0.5}, {"guidance_batch": 1}],
    ids=lambda o: next(iter(o)),
)
def test_guidance_is_the_same_in_every_form(
    pipe: sdopt.Pipeline, reference: sdopt.Pipeline, options: dict[str, Any]
) -> None:
    found, expected = (p("a red apple", **{**OPTIONS, **options}).images for p in (pipe, reference))
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_shape_that_comes_back_finds_its_graph(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    a, b = OPTIONS, {**OPTIONS, "height": 96, "num_images_per_prompt": 3}  # b needs a larger arena: a is warmed again
    first, second = pipe("a red apple", **a).images, pipe("a red apple", **b).images
    np.testing.assert_array_equal(pipe("a red apple", **a).images, first)
    gpu.calls.clear()
    np.testing.assert_array_equal(pipe("a red apple", **b).images, second)
    np.testing.assert_array_equal(pipe("a red apple", **a).images, first)
    assert not {"malloc", "capture"} & set(gpu.calls)


def test_replaying_a_graph_equals_launching_without_one(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    replayed = pipe("a red apple", **OPTIONS).images
    assert "launch" in gpu.calls
    for component in ("unet_step", "text_encoder"):
        pipe.release(component)
    gpu.capturable = False
    gpu.calls.clear()
    np.testing.assert_array_equal(pipe("a red apple", **OPTIONS).images, replayed)
    assert not {"launch", "capture"} & set(gpu.calls)


def test_two_threads_make_their_own_pictures(pipe: sdopt.Pipeline) -> None:
    def picture(i: int) -> Array:
        return pipe(
            "a red apple", **{**OPTIONS, "seed": i % 2, "num_inference_steps": 2, "height": 64 + 32 * (i % 2)}
        ).images

    expected = [picture(i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for i, found in enumerate(pool.map(picture, range(6))):
            np.testing.assert_array_equal(found, expected[i % 2])


def test_many_pictures_need_no_more_memory_than_one(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    options = {**OPTIONS, "num_inference_steps": 1}
    pipe("a red apple", **options)
    held, pinned = gpu.memory(), len(gpu.pinned_blocks)
    for seed in range(20):
        pipe("a red apple", **{**options, "seed": seed})
    assert (gpu.memory(), len(gpu.pinned_blocks)) == (held, pinned)


def test_idle_shapes_are_forgotten_in_the_end(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    engine = pipe.engine("vae_decoder")
    blocks = []
    for width in range(8, 24, 2):
        engine(latent_sample=np.zeros((1, 4, 8, width), np.float32))
        blocks.append(len(gpu.blocks))
    assert blocks[-1] == blocks[4]


def test_a_shape_outside_every_profile_names_the_nearest_and_the_command(pipe: sdopt.Pipeline) -> None:
    with pytest.raises(
        UsageError,
        match=r"unet_step: got latent_width = 40; the nearest profile of this engine is batch=1:1:4 latent_height=1:16"
        r'.*sdopt build BUNDLE --profile "batch=1:1:4 height=8:128:256 width=8:128:320 tokens=1:32:64"',
    ):
        pipe("a red apple", height=64, width=320, seed=1)


def test_a_full_gpu_says_who_holds_what_and_recovers(stocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, total=400_000)
    with sdopt.load(stocked, backend="tensorrt") as pipe:
        with pytest.raises(
            OutOfMemoryError, match=r"memory is full: .* asked, .* of 400000 bytes free; held here: .*scratch"
        ):
            pipe("a red apple", seed=1, num_images_per_prompt=4, num_inference_steps=1)
        assert pipe("a red apple", **OPTIONS).images.shape == (1, 4, 8, 8)


def test_a_lost_context_says_that_only_a_new_process_helps_and_is_never_touched_again(
    pipe: sdopt.Pipeline, gpu: FakeCuda
) -> None:
    engine = pipe.engine("vae_decoder")
    gpu.lose()
    latents = np.zeros((1, 4, 8, 8), np.float32)
    with pytest.raises(LostContextError, match="700"):
        engine(latent_sample=latents)
    gpu.fail = None
    gpu.calls.clear()
    with pytest.raises(LostContextError, match="700"):
        engine(latent_sample=latents)
    assert not gpu.calls


def test_nan_on_the_gpu_is_an_error_and_not_a_black_picture(pipe: sdopt.Pipeline) -> None:
    embeds = np.full((1, 32, 128), np.nan, np.float32)
    with pytest.raises(NumericsError, match="unet, step 4 of 4"):
        pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, **OPTIONS)


def test_wrong_inputs_of_a_run_are_refused_before_anything_runs(pipe: sdopt.Pipeline, gpu: FakeCuda) -> None:
    engine: Any = pipe.engine("unet_step")
    gpu.calls.clear()
    for arrays, message in (
        ({"sampel": np.zeros(1, np.float32)}, "unknown input sampel"),
        ({"sample": np.zeros((1, 3, 8, 8), np.float32)}, "with 4"),
        ({"sample": np.zeros((1, 4, 8, 8), np.float32)}, "nothing tells tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            engine.begin(arrays, {})
    assert not gpu.calls


def test_the_engine_of_several_profiles_takes_the_nearest() -> None:
    profiles = [Profile.parse(text) for text in ("height=64:64:96", "height=64:96:128", "height=256")]
    best = [min(range(3), key=lambda i: profiles[i].distance({"height": h})) for h in (64, 96, 120, 250)]
    assert best == [0, 1, 1, 2]


def test_a_plan_that_does_not_load_says_what_tensorrt_said(
    stocked: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt: Any = sys.modules["tensorrt"]

    class Refusing:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, plan: Any) -> None:
            self.log.log(1, "The engine plan file is not compatible with this version of TensorRT")

    monkeypatch.setattr(trt, "Runtime", Refusing)
    with pytest.raises(BackendError, match=r"unet: tensorrt fake cannot load the engine: The engine plan file is not"):
        open_engine(Bundle.open(stocked, verify=False), "unet", "tensorrt")


def test_a_device_is_named_by_its_number(stocked: Path, gpu: FakeCuda) -> None:
    with pytest.raises(UsageError, match="there are tensorrt, tensorrt:0, tensorrt:1"):
        open_engine(Bundle.open(stocked, verify=False), "unet", "tensorrt:cpu")
