"""Whose memory is on the GPU, and for how long: engines that nobody closes, several GPUs, plans for several sizes,
streamed weights, and what TensorRT-RTX compiled."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.files import Bundle
from sdopt.cli.main import main
from sdopt.engine import device, open_engine
from sdopt.errors import BackendError, UsageError
from tests.conftest import EMOJI_BUNDLE, PlugIn
from tests.engine.conftest import WIDE
from tests.engine.plans import stock
from tests.fakes.gpu import Simulator

OPTIONS: dict[str, Any] = {
    "seed": 3, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "height": 64, "width": 64,
}  # fmt: skip
LATENTS = np.zeros((1, 4, 8, 8), np.float32)


def opened(stocked: Path, component: str = "vae_decoder", backend: str = "tensorrt") -> Any:
    return open_engine(Bundle.open(stocked, verify=False), component, backend)


# ---- engines that nobody closes


def test_a_pipeline_that_is_dropped_leaves_nothing_on_the_gpu(stocked: Path, gpu: Simulator) -> None:
    pipe = sdopt.load(stocked, backend="tensorrt")
    pipe("a red apple", **OPTIONS)
    assert gpu.leaks()
    del pipe
    gc.collect()
    assert gpu.leaks() == {}


def test_a_loop_that_is_dropped_in_the_middle_leaves_nothing_on_the_gpu(stocked: Path, gpu: Simulator) -> None:
    steps = sdopt.load(stocked, backend="tensorrt").denoise("a red apple", seed=1, num_inference_steps=4)
    step = next(steps)
    del steps
    gc.collect()
    assert np.isfinite(step.sample).all()  # its last step is kept, as data
    assert gpu.leaks() == {}


def test_an_engine_that_is_dropped_while_another_queues_is_freed_by_the_next_who_does(
    stocked: Path, gpu: Simulator
) -> None:
    engine, other = opened(stocked), opened(stocked, "text_encoder")
    engine(latent_sample=LATENTS)
    with device.shared_device().queueing():
        del engine
        gc.collect()
        assert gpu.held["weights"] > 3 << 20
    with device.shared_device().queueing():
        pass
    other.close()


def test_an_engine_may_be_closed_while_its_run_goes_on(stocked: Path, gpu: Simulator) -> None:
    with sdopt.load(stocked, backend="tensorrt") as pipe:
        expected = [step.sample for step in pipe.denoise("a red apple", seed=1, num_inference_steps=3)]
        for step in pipe.denoise("a red apple", seed=1, num_inference_steps=3):
            pipe.release("unet_step")
            np.testing.assert_array_equal(step.sample, expected[step.index])


def test_a_run_that_is_over_says_so(stocked: Path, gpu: Simulator) -> None:
    with opened(stocked) as engine:
        run = engine.begin({"latent_sample": LATENTS}, {})
        run.close()
        with pytest.raises(UsageError, match="vae_decoder: this run is over"):
            run.launch(0)


def test_a_component_that_is_called_once_runs_once(stocked: Path, gpu: Simulator) -> None:
    with opened(stocked) as engine:
        for runs, launches in ((1, 0), (1, 1), (1, 2)):
            engine(latent_sample=LATENTS)
            assert (gpu.calls.count("compute"), gpu.calls.count("launch")) == (runs, launches)


def test_the_command_fetches_the_last_step_alone(stocked: Path, gpu: Simulator, tmp_path: Path) -> None:
    words = ["generate", "a red apple", "-m", str(stocked), "--backend", "tensorrt", "--size", "64x64"]
    downloads: list[int] = []
    for steps in (2, 9):
        gpu.calls.clear()
        assert main([*words, "--steps", str(steps), "-o", str(tmp_path / "a.png")]) == 0
        downloads.append(gpu.calls.count("download"))
    assert downloads[0] == downloads[1] < 6


# ---- several GPUs, and other users of CUDA in the process


def test_the_current_gpu_of_whoever_else_uses_cuda_stays_as_it_was(stocked: Path, plug_in: PlugIn) -> None:
    gpu = plug_in(devices=2)
    gpu.cudaSetDevice(1)
    with sdopt.load(stocked, backend="tensorrt") as pipe:
        pipe("a red apple", **OPTIONS)
        assert gpu.cudaGetDevice() == (0, 1)
    assert gpu.cudaGetDevice() == (0, 1)


def test_a_second_gpu_is_named_by_its_number(stocked: Path, plug_in: PlugIn) -> None:
    plug_in(devices=2)
    with pytest.raises(BackendError, match="GPU was Fake GPU, is Fake GPU 1"):
        opened(stocked, backend="tensorrt:1")
    with pytest.raises(BackendError, match="there is no GPU 2; this process sees 2"):
        opened(stocked, backend="tensorrt:2")


# ---- plans for several sizes


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded bundle with a plan for 64x64, then one for 96x96."""
    bundle = tmp_path_factory.mktemp("sizes") / "bundle"
    for size in (64, 96):
        stock(EMOJI_BUNDLE, bundle, [f"batch=1:1:2 height={size} width={size}"], ["vae_decoder"])
    return bundle


def test_the_plan_is_taken_whose_profile_fits(sizes: Path, gpu: Simulator) -> None:
    with opened(sizes) as engine:
        for size in (8, 12, 8):
            shape = engine(latent_sample=np.zeros((1, 4, size, size), np.float32))["sample"].shape
            assert shape == (1, 3, 8 * size, 8 * size)
        with pytest.raises(UsageError, match=r"latent_height = 16, latent_width = 16; the nearest profile .*=12"):
            engine(latent_sample=np.zeros((1, 4, 16, 16), np.float32))


def test_of_plans_that_fit_the_nearest_is_taken_and_only_it_is_loaded(
    sizes: Path, gpu: Simulator, tmp_path: Path
) -> None:
    shutil.copytree(sizes, tmp_path / "bundle")
    shutil.copytree(sizes.parent / "bundle-graphs", tmp_path / "bundle-graphs")
    stock(EMOJI_BUNDLE, tmp_path / "bundle", ["batch=1:1:2 height=64:128:256 width=64:128:256"], ["vae_decoder"])
    with opened(tmp_path / "bundle") as engine:
        loaded = gpu.held["weights"]
        engine(latent_sample=np.zeros((1, 4, 16, 16), np.float32))
        assert gpu.held["weights"] == loaded
        engine(latent_sample=LATENTS)
        assert gpu.held["weights"] == 2 * loaded


def test_a_plan_for_another_size_makes_room_where_both_do_not_fit(sizes: Path, plug_in: PlugIn) -> None:
    weights = (sizes.parent / "bundle-graphs/vae_decoder.onnx.data").stat().st_size
    plug_in(total=int(1.5 * weights))
    with opened(sizes) as engine:
        for size in (8, 12, 8):
            assert np.isfinite(engine(latent_sample=np.zeros((1, 4, size, size), np.float32))["sample"]).all()


# ---- TensorRT's refusals, with its words


def test_what_tensorrt_refuses_is_told_with_its_words(
    stocked: Path, gpu: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdopt.engine.trt_api.Context.scratch", lambda context, address, nbytes: None)
    with opened(stocked) as engine, pytest.raises(BackendError, match="did not queue the run.*device memory of 0"):
        engine(latent_sample=LATENTS)


def test_no_size_of_scratch_memory_is_an_error(stocked: Path, gpu: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.fakes.trt.FakeContext.update_device_memory_size_for_shapes", lambda context: 0, raising=True
    )
    with opened(stocked) as engine, pytest.raises(BackendError, match="does not tell how much memory it needs"):
        engine(latent_sample=LATENTS)


def test_two_contexts_on_one_profile_need_its_sharing_in_8_6(
    stocked: Path, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in("8.6")
    with opened(stocked) as engine:
        engine(latent_sample=LATENTS)
        engine(latent_sample=np.zeros((1, 4, 8, 12), np.float32))
        monkeypatch.setattr("tests.fakes.trt.SHARES", False)
        with pytest.raises(BackendError, match="Profile 0 has been chosen by another context"):
            engine(latent_sample=np.zeros((1, 4, 8, 16), np.float32))


# ---- streamed weights


@pytest.mark.parametrize("flavour", ["10", "10.0"])
def test_weights_that_do_not_fit_are_streamed(
    flavour: str, tmp_path: Path, plug_in: PlugIn, own_folders: Path, messages: list[str]
) -> None:
    bundle = stock(EMOJI_BUNDLE, tmp_path / "bundle", [WIDE], ["vae_decoder"], weight_streaming=True)
    weights = (tmp_path / "bundle-graphs/vae_decoder.onnx.data").stat().st_size
    plug_in(flavour, total=int(0.9 * weights))
    with opened(bundle) as engine:
        first, second = (engine(latent_sample=LATENTS)["sample"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert "vae_decoder: no CUDA graph" in messages[0]


# ---- what TensorRT-RTX compiles


def test_what_tensorrt_rtx_compiled_is_kept_for_the_next_process(
    tmp_path: Path, plug_in: PlugIn, own_folders: Path, messages: list[str]
) -> None:
    bundle = stock(EMOJI_BUNDLE, tmp_path / "bundle", [WIDE], ["vae_decoder"], "tensorrt-rtx")
    compiled: list[int] = []
    for cache in (True, True, False):
        gpu = plug_in("rtx")
        library = __import__("sys").modules["tensorrt_rtx"].fake
        with open_engine(Bundle.open(bundle, verify=False), "vae_decoder", "tensorrt-rtx", cache=cache) as engine:
            for _ in range(3):
                engine(latent_sample=LATENTS)
        compiled.append(library.jit)
        assert gpu.calls.count("launch") == 2  # EAGER: no fallback kernel is in the way of a graph
    assert compiled == [1, 0, 1]
    assert not messages


def test_a_damaged_cache_of_compiled_kernels_is_made_again(tmp_path: Path, plug_in: PlugIn, own_folders: Path) -> None:
    bundle = stock(EMOJI_BUNDLE, tmp_path / "bundle", [WIDE], ["vae_decoder"], "tensorrt-rtx")
    for _ in range(2):
        plug_in("rtx")
        with opened(bundle, backend="tensorrt-rtx") as engine:
            engine(latent_sample=LATENTS)
        (kept,) = (own_folders / "cache/sdopt/compiled").iterdir()
        assert kept.stat().st_size > 3
        kept.write_bytes(b"\0\0\0")


def test_compiled_kernels_that_others_could_have_written_are_not_read(
    tmp_path: Path, plug_in: PlugIn, own_folders: Path
) -> None:
    bundle = stock(EMOJI_BUNDLE, tmp_path / "bundle", [WIDE], ["vae_decoder"], "tensorrt-rtx")
    compiled: list[int] = []
    for mode in (0o600, 0o666, 0o600):
        plug_in("rtx")
        with opened(bundle, backend="tensorrt-rtx") as engine:
            engine(latent_sample=LATENTS)
        compiled.append(__import__("sys").modules["tensorrt_rtx"].fake.jit)
        (kept,) = (own_folders / "cache/sdopt/compiled").iterdir()
        kept.chmod(mode)
    assert compiled == [1, 0, 1]


# ---- staging memory


def counting(stocked: Path) -> Any:
    """A run of the fused UNet, and inputs for it."""
    engine = opened(stocked, "unet_step")
    rng = np.random.default_rng(0)
    dims = {"batch": 1, "images": 1, "tokens": 4, "latent_height": 8, "latent_width": 8}
    return engine, {s.name: rng.standard_normal(s.sized(dims)).astype(s.dtype) for s in engine.inputs}


def test_an_input_may_be_put_again_while_the_gpu_is_behind(stocked: Path, gpu: Simulator) -> None:
    engine, arrays = counting(stocked)
    results: list[Any] = []
    with engine:
        for fetches in (True, False):
            run = engine.begin(arrays, {})
            for k in range(3):
                run.put("sample", arrays["sample"] * (k + 1))
                run.launch(k)
                if fetches:
                    run.fetch("denoised")
            run.put("history", arrays["history"] + run.fetch("next_history"))
            run.launch(3)
            results.append(run.fetch("next_sample"))
            run.close()
    np.testing.assert_array_equal(*results)


def test_several_inputs_may_be_streamed_in_one_call(stocked: Path, gpu: Simulator) -> None:
    engine, arrays = counting(stocked)
    tables = {"row": np.stack([arrays["row"]] * 3)}
    inputs = {n: a for n, a in arrays.items() if n != "row"}
    results: list[Any] = []
    with engine:
        for streams in (True, False):
            run = engine.begin(inputs, tables)
            for k in range(3):
                given = {"noise": arrays["noise"] * k, "sample": arrays["sample"] * (k + 1)}
                if streams:
                    run.launch(k, **given)
                    continue
                for name, array in given.items():
                    run.put(name, array)
                run.launch(k)
            results.append(run.fetch("next_sample"))
            run.close()
    np.testing.assert_array_equal(*results)


def test_what_python_collects_during_a_capture_does_not_get_into_the_graph(
    stocked: Path, gpu: Simulator, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropped() -> None:
        """A loop in a cycle, for the collector alone to find."""
        steps = pipe.denoise("a red apple", seed=1, num_inference_steps=4)
        next(steps)
        cycle: list[Any] = [steps]
        cycle.append(cycle)

    enqueue = __import__("sdopt.engine.trt_api", fromlist=["Context"]).Context.enqueue

    def wasteful(context: Any, stream: int) -> None:
        if gpu.capturing(stream):
            gc.set_threshold(1, 1, 1)  # from here on, each allocation collects
            _ = [[[]] for _ in range(100)]
        enqueue(context, stream)

    thresholds = gc.get_threshold()
    with sdopt.load(stocked, backend="tensorrt") as pipe:
        expected = pipe("a cat", **OPTIONS).images
        pipe.release("unet_step")
        monkeypatch.setattr("sdopt.engine.trt_api.Context.enqueue", wasteful)
        gc.collect()
        gc.set_threshold(1_000_000, 1_000_000, 1_000_000)
        try:
            dropped()
            last = list(pipe.denoise("a cat", **{k: v for k, v in OPTIONS.items() if k != "output_type"}))[-1]
        finally:
            gc.set_threshold(*thresholds)
        np.testing.assert_array_equal(last.sample, expected)
    assert not messages


# ---- memory that moves or goes while work is queued


def started(stocked: Path) -> tuple[Any, Any, dict[str, Any]]:
    """An engine of whole steps, a run of it whose first launch nobody has waited for, and its inputs."""
    engine, arrays = counting(stocked)
    run = engine.begin({n: a for n, a in arrays.items() if n != "row"}, {"row": np.stack([arrays["row"]] * 2)})
    run.launch(0)
    return engine, run, arrays


def test_scratch_memory_moves_when_nothing_uses_it(stocked: Path, gpu: Simulator) -> None:
    results: list[Any] = []
    with opened(stocked) as decoder:
        for disturbed in (False, True):
            engine, run, _ = started(stocked)
            if disturbed:
                decoder(latent_sample=np.zeros((4, 4, 8, 8), np.float32))  # needs more scratch memory
            run.launch(1)
            results.append(run.fetch("next_sample"))
            run.close()
            engine.close()
    np.testing.assert_array_equal(*results)


def test_what_lies_idle_goes_when_nothing_uses_it(stocked: Path, gpu: Simulator) -> None:
    results: list[Any] = []
    for disturbed in (False, True):
        engine, run, _ = started(stocked)
        if disturbed:
            with device.shared_device().queueing():
                device.shared_device().trim()
        run.launch(1)
        results.append(run.fetch("next_sample"))
        run.close()
        engine.close()
    np.testing.assert_array_equal(*results)


def test_tables_grow_when_nothing_reads_the_old_ones(stocked: Path, gpu: Simulator) -> None:
    engine, run, arrays = started(stocked)
    run.close()
    inputs = {n: a for n, a in arrays.items() if n != "row"}
    with engine:
        longer = engine.begin(inputs, {"row": np.stack([arrays["row"]] * 500)})
        longer.launch(499)
        assert np.isfinite(longer.fetch("next_sample")).all()
        longer.close()
