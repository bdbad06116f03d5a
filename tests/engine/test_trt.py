"""TensorRT engines on a GPU of NumPy arrays: the contract, the fused loop, shapes, threads, memory, failures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Profile
from sdopt.engine import Engine, device, open_engine
from sdopt.engine.cuda_errors import LostContextError, OutOfMemoryError
from sdopt.errors import BackendError, NumericsError, UsageError
from sdopt.samplers import SAMPLERS
from tests.conftest import PlugIn
from tests.engine.contract import CONTRACT, unet_inputs
from tests.fakes.gpu import Simulator


@pytest.fixture(params=["10", "10.0", "8.6"])
def cuda(request: pytest.FixtureRequest, plug_in: PlugIn) -> Simulator:
    return plug_in(request.param)


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda p: p.__name__)
def test_contract(stocked: Path, cuda: Simulator, promise: Callable[[Engine], None]) -> None:
    with open_engine(Bundle.open(stocked, verify=False), "unet", "tensorrt") as engine:
        promise(engine)


def test_a_closed_engine_refuses_to_be_called_and_gives_all_memory_back(stocked: Path, gpu: Simulator) -> None:
    engine = open_engine(Bundle.open(stocked, verify=False), "unet", "tensorrt")
    engine(**unet_inputs(engine))
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine(**unet_inputs(engine))
    assert device.shared_device().held == {}
    assert gpu.leaks() == {}


QUIET = ("cudaSetDevice",)
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


def test_the_host_waits_for_nothing_between_steps(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
    pipe("a red apple", **OPTIONS)  # captures the graph
    steps = pipe.denoise("a red apple", seed=1, num_inference_steps=6, sampler="euler_a", **SMALL)
    next(steps)
    gpu.calls.clear()
    for _ in range(5):
        next(steps)
    assert [c for c in gpu.calls if c not in QUIET] == ["upload", "copy", "launch"] * 5  # noise, row, graph
    gpu.calls.clear()
    steps = pipe.denoise("a red apple", seed=1, num_inference_steps=6, sampler="euler", **SMALL)
    next(steps)
    gpu.calls.clear()
    for _ in range(5):
        next(steps)
    assert [c for c in gpu.calls if c not in QUIET] == ["copy", "launch"] * 5


def test_one_graph_serves_all_samplers_and_step_counts(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
    for _ in range(2):  # the second time, the text encoder's graph is captured
        pipe("a red apple", **{**OPTIONS, "sampler": "euler_a"})
    gpu.calls.clear()
    for sampler, steps in (("euler", 2), ("dpmpp_2m", 3), ("lcm", 1)):
        pipe("a cat", **{**OPTIONS, "num_inference_steps": steps, "sampler": sampler})
    assert "capture" not in gpu.calls
    assert "malloc" not in gpu.calls


def test_previews_are_fetched_only_when_asked_for_and_are_those_of_the_numpy_loop(
    pipe: sdopt.Pipeline, reference: sdopt.Pipeline, gpu: Simulator
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
    uninterrupted = pipe("a red apple", **OPTIONS).images
    for step in pipe.denoise("a red apple", **_denoise()):
        if step.index == 1:
            break
    other = pipe("a cat", **OPTIONS).images
    assert np.isfinite(step.sample).all()
    assert not np.array_equal(other, step.sample)
    np.testing.assert_array_equal(pipe("a red apple", **OPTIONS).images, uninterrupted)


def _denoise() -> dict[str, Any]:
    return {k: v for k, v in OPTIONS.items() if k != "output_type"}


def test_writing_into_a_sample_steers_the_fused_loop_as_it_does_the_other(
    pipe: sdopt.Pipeline, reference: sdopt.Pipeline
) -> None:
    def halve(_: sdopt.Pipeline, index: int, timestep: float, data: dict[str, Array]) -> dict[str, Array]:
        return {"latents": data["latents"] / 2} if index == 1 else {}

    actual, expected = (p("a red apple", callback_on_step_end=halve, **OPTIONS).images for p in (pipe, reference))
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    assert not np.allclose(actual, pipe("a red apple", **OPTIONS).images, atol=2e-2)


def test_inpainting_with_a_mask_holds_what_it_keeps(pipe: sdopt.Pipeline, reference: sdopt.Pipeline) -> None:
    image, mask = np.full((64, 64, 3), 0.3, np.float32), np.zeros((64, 64), np.float32)
    mask[:, 32:] = 1
    options = {**OPTIONS, "image": image, "mask_image": mask, "strength": 0.9}
    actual, expected = (p("a red apple", **options).images for p in (pipe, reference))
    np.testing.assert_allclose(actual, expected, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [{"guidance_scale": 1.0}, {"guidance_interval": (0.3, 0.8)}, {"guidance_rescale": 0.5}, {"guidance_batch": 1}],
    ids=lambda o: next(iter(o)),
)
def test_guidance_is_the_same_in_every_form(
    pipe: sdopt.Pipeline, reference: sdopt.Pipeline, options: dict[str, Any]
) -> None:
    actual, expected = (p("a red apple", **{**OPTIONS, **options}).images for p in (pipe, reference))
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_a_shape_that_comes_back_finds_its_graph(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
    a, b = OPTIONS, {**OPTIONS, "height": 96, "num_images_per_prompt": 3}  # b needs a larger arena: a is warmed again
    first, second = pipe("a red apple", **a).images, pipe("a red apple", **b).images
    for _ in range(2):
        np.testing.assert_array_equal(pipe("a red apple", **a).images, first)
    gpu.calls.clear()
    np.testing.assert_array_equal(pipe("a red apple", **b).images, second)
    np.testing.assert_array_equal(pipe("a red apple", **a).images, first)
    assert not {"malloc", "capture"} & set(gpu.calls)


def test_replaying_a_graph_equals_launching_without_one_and_that_there_is_none_is_told(
    pipe: sdopt.Pipeline, gpu: Simulator, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    replayed = pipe("a red apple", **OPTIONS).images
    assert "launch" in gpu.calls
    for component in ("unet_step", "text_encoder"):
        pipe.release(component)
    monkeypatch.setattr("sdopt.engine.trt_api.Context.capturable", lambda context, stream: False)
    gpu.calls.clear()
    np.testing.assert_array_equal(pipe("a red apple", **OPTIONS).images, replayed)
    assert not {"launch", "capture"} & set(gpu.calls)
    assert messages == [
        "unet_step: no CUDA graph, so every call is launched kernel by kernel, which is slower: "
        "TensorRT says that this stream cannot be captured"
    ]


def test_two_threads_make_their_own_pictures(pipe: sdopt.Pipeline) -> None:
    def picture(i: int) -> Array:
        return pipe(
            "a red apple", **{**OPTIONS, "seed": i % 2, "num_inference_steps": 2, "height": 64 + 32 * (i % 2)}
        ).images

    expected = [picture(i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for i, actual in enumerate(pool.map(picture, range(6))):
            np.testing.assert_array_equal(actual, expected[i % 2])


def test_many_pictures_need_no_more_memory_than_one(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
    options = {**OPTIONS, "num_inference_steps": 1}
    pipe("a red apple", **options)
    pipe("a red apple", **options)
    held = gpu.leaks()
    for seed in range(20):
        pipe("a red apple", **{**options, "seed": seed})
    assert gpu.leaks() == held


def test_idle_shapes_are_forgotten_in_the_end(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
    engine = pipe.engine("vae_decoder")
    blocks = []
    for width in range(8, 24, 2):
        engine(latent_sample=np.zeros((1, 4, 8, width), np.float32))
        blocks.append(len(gpu.blocks))
    assert blocks[-1] == blocks[4]


def test_a_shape_outside_every_profile_names_the_nearest_and_the_command(pipe: sdopt.Pipeline) -> None:
    with pytest.raises(
        UsageError,
        match=r"unet_step: got latent_width = 40; the nearest profile of this engine is batch=1:1:4 tokens=1:32:64"
        r".*sdopt build .* --component unet_step "
        r'--profile "batch=1:1:4 tokens=1:32:64 height=8:128:256 width=8:128:320", or use --backend ort',
    ):
        pipe("a red apple", height=64, width=320, seed=1)


def weights_of(stocked: Path, *components: str) -> int:
    graphs = stocked.parent / f"{stocked.name}-graphs"
    return sum((graphs / f"{name}.onnx.data").stat().st_size for name in components)


def test_a_full_gpu_says_who_holds_what_and_recovers(stocked: Path, plug_in: PlugIn) -> None:
    plug_in(total=weights_of(stocked, "text_encoder", "unet_step") + 400_000)
    with sdopt.load(stocked, backend="tensorrt") as pipe:
        with pytest.raises(OutOfMemoryError, match=r"memory is full: .* asked, .* free; held here: .*unet_step 13"):
            pipe("a red apple", seed=1, num_images_per_prompt=4, num_inference_steps=1)
        assert pipe("a red apple", **OPTIONS).images.shape == (1, 4, 8, 8)
        with pytest.raises(OutOfMemoryError, match=r"vae_decoder: the GPU's memory is full: .*OutOfMemory"):
            pipe.engine("vae_decoder")


def test_what_lies_idle_makes_room_before_anything_is_refused(stocked: Path, plug_in: PlugIn) -> None:
    gpu = plug_in(total=weights_of(stocked, "vae_decoder") + 1_000_000)
    with open_engine(Bundle.open(stocked, verify=False), "vae_decoder", "tensorrt") as engine:
        for width in (8, 16, 24, 32, 8, 32):  # any two of the larger ones do not fit beside each other
            shape = engine(latent_sample=np.zeros((1, 4, 16, width), np.float32))["sample"].shape
            assert shape == (1, 3, 128, 8 * width)
    assert gpu.calls.count("malloc") > 6


def test_a_lost_context_says_that_only_a_new_process_helps_and_is_never_touched_again(
    pipe: sdopt.Pipeline, gpu: Simulator
) -> None:
    engine = pipe.engine("vae_decoder")
    gpu.lose()
    latents = np.zeros((1, 4, 8, 8), np.float32)
    with pytest.raises(LostContextError, match="700"):
        engine(latent_sample=latents)
    gpu.calls.clear()
    with pytest.raises(LostContextError, match="700"):
        engine(latent_sample=latents)
    assert not gpu.calls


def test_nan_on_the_gpu_is_an_error_and_not_a_black_picture(pipe: sdopt.Pipeline) -> None:
    embeds = np.full((1, 32, 128), 3e38, np.float32)  # finite, as an argument must be
    with pytest.raises(NumericsError, match="unet, step 4 of 4"):
        pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, **OPTIONS)


def test_wrong_inputs_of_a_run_are_refused_before_anything_runs(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
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
    stocked: Path, gpu: Simulator, monkeypatch: pytest.MonkeyPatch
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


def test_a_device_is_named_by_its_number(stocked: Path, gpu: Simulator) -> None:
    with pytest.raises(UsageError, match="there are tensorrt, tensorrt:0, tensorrt:1"):
        open_engine(Bundle.open(stocked, verify=False), "unet", "tensorrt:cpu")
