"""What goes wrong in the middle: a CUDA call that fails, a run that is left, threads, a fork; and what comes after."""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.files import Bundle
from sdopt.engine import device, open_engine
from sdopt.engine.cuda_errors import CudaError, LostContextError
from sdopt.errors import UsageError
from tests.conftest import EMOJI_BUNDLE, PlugIn
from tests.engine.conftest import WIDE
from tests.engine.plans import stock
from tests.engine.test_trt_memory import LATENTS, OPTIONS, counting, opened
from tests.fakes.gpu import Simulator

STEPS: dict[str, Any] = {k: v for k, v in OPTIONS.items() if k != "output_type"}

# ---- one CUDA call that fails

CALLS = (
    "cudaMalloc", "cudaMallocHost", "cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventSynchronize",
    "cudaMemcpyAsync", "cudaMemsetAsync", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate",
    "cudaGraphUpload", "cudaGraphLaunch", "weights", "contexts",
)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "times"), [*((c, 1) for c in CALLS), *((c, 2) for c in ("cudaMalloc", "weights", "contexts"))]
)
def test_a_call_that_fails_is_told_and_leaves_nothing_and_the_next_picture_is_right(
    call: str, times: int, stocked: Path, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    unheard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    options = {**OPTIONS, "num_inference_steps": 3, "sampler": "euler_ancestral"}
    plug_in()
    with sdopt.load(stocked, backend="tensorrt") as pipe:
        expected = pipe("a red apple", **options).images
    first = 0
    while True:
        first += 1
        gpu = plug_in()
        gpu.full_at[call] = range(first, first + times)
        with sdopt.load(stocked, backend="tensorrt") as pipe:
            with suppress(CudaError):
                np.testing.assert_array_equal(pipe("a red apple", **options).images, expected)
            seen = gpu.counts.get(call, 0)
            gpu.full_at.clear()
            np.testing.assert_array_equal(pipe("a red apple", **options).images, expected)
        gc.collect()
        assert gpu.leaks() == {}, first
        assert device.shared_device().held == {}, first
        assert not unheard, first
        if seen < first:
            break
    assert first > 1


def test_an_interrupted_capture_leaves_no_graph(stocked: Path, gpu: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdopt.engine.trt_api import Context

    enqueue = Context.enqueue

    def interrupted(context: Context, stream: int) -> None:
        enqueue(context, stream)
        if gpu.capturing(stream):
            raise KeyboardInterrupt

    with opened(stocked) as engine:
        expected = engine(latent_sample=LATENTS)["sample"]
        monkeypatch.setattr(Context, "enqueue", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine(latent_sample=LATENTS)
        monkeypatch.setattr(Context, "enqueue", enqueue)
        np.testing.assert_array_equal(engine(latent_sample=LATENTS)["sample"], expected)


# ---- runs


def test_a_call_after_a_run_takes_no_row_of_its_tables(stocked: Path, gpu: Simulator) -> None:
    engine, arrays = counting(stocked)
    with engine:
        expected = engine(**arrays)["next_sample"]
        run = engine.begin({n: a for n, a in arrays.items() if n != "row"}, {"row": np.stack([2 * arrays["row"]])})
        run.launch(0)
        run.close()
        np.testing.assert_array_equal(engine(**arrays)["next_sample"], expected)


def test_a_run_takes_only_what_fits_it(stocked: Path, gpu: Simulator) -> None:
    engine, arrays = counting(stocked)
    tables = {"row": np.stack([arrays["row"]] * 2)}
    with engine:
        run = engine.begin({n: a for n, a in arrays.items() if n != "row"}, tables)
        with pytest.raises(UsageError, match=r"unet_step input 'sample': got \[1, 4, 8, 16\]; this run has"):
            run.put("sample", np.zeros((1, 4, 8, 16), np.float32))
        with pytest.raises(UsageError, match="unet_step: unknown input denoised; it takes sample"):
            run.launch(0, denoised=arrays["sample"])
        for k in (-1, 2):
            with pytest.raises(UsageError, match=f"unet_step: there is no call {k}; .* 2 rows"):
                run.launch(k)
        run.close()
        with pytest.raises(UsageError, match="the table of row has no row"):
            engine.begin({n: a for n, a in arrays.items() if n != "row"}, {"row": tables["row"][:0]})
        run = engine.begin(arrays, {})
        with pytest.raises(UsageError, match="unet_step: there is no call 1"):
            run.launch(1, noise=arrays["noise"])
        run.close()


def test_the_same_call_may_be_launched_again_while_the_gpu_is_behind(stocked: Path, gpu: Simulator) -> None:
    engine, arrays = counting(stocked)
    results: list[Any] = []
    with engine:
        for waits in (True, False):
            run = engine.begin(arrays, {})
            for scale in (1, 5):
                run.launch(0, noise=arrays["noise"] * scale, sample=arrays["sample"] * scale)
                if waits:
                    run.fetch("denoised")
            results.append(run.fetch("next_history"))
            run.close()
    np.testing.assert_array_equal(*results)


def test_work_that_is_queued_when_its_engine_is_closed_harms_no_other(stocked: Path, gpu: Simulator) -> None:
    engine, arrays = counting(stocked)
    with opened(stocked) as other:
        expected = other(latent_sample=LATENTS)["sample"]
        run = engine.begin(arrays, {})
        run.launch(0)
        run.close()
        engine.close()
        np.testing.assert_array_equal(other(latent_sample=LATENTS)["sample"], expected)


def test_a_loop_that_the_collector_finds_with_its_pipeline_ends_in_silence(
    stocked: Path, gpu: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    unheard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    pipe: Any = sdopt.load(stocked, backend="tensorrt")
    steps = pipe.denoise("a red apple", **STEPS)
    next(steps)
    cycle: list[Any] = [steps, pipe]
    cycle.append(cycle)
    del steps, cycle, pipe
    gc.collect()
    assert not unheard
    assert gpu.leaks() == {}


def test_a_step_whose_successor_was_interrupted_does_not_show_the_successors_data(
    stocked: Path, pipe: sdopt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdopt.engine.trt import TrtRun

    launch = TrtRun.launch

    def interrupted(run: TrtRun, k: int, **arrays: Any) -> None:
        launch(run, k, **arrays)
        if k == 1:
            raise KeyboardInterrupt

    expected = [step.sample for step in pipe.denoise("a red apple", **STEPS)]
    monkeypatch.setattr(TrtRun, "launch", interrupted)
    steps = pipe.denoise("a red apple", **STEPS)
    first = next(steps)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    with pytest.raises(UsageError, match="step 1 of 4: its data was on the GPU until the next step"):
        np.testing.assert_array_equal(first.sample, expected[0])


def test_the_error_that_ends_a_loop_is_the_one_that_is_told(
    stocked: Path, gpu: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sdopt.load(stocked, backend="tensorrt") as pipe:
        steps = pipe.denoise("a red apple", **STEPS)
        next(steps)
        monkeypatch.setattr("sdopt.engine.trt.TrtRun.fetch", lambda run, name: (_ for _ in ()).throw(CudaError("two")))
        gpu.fail_next["cudaGraphLaunch"] = gpu.fail_next["cudaStreamBeginCapture"] = 1
        with pytest.raises(ValueError, match="one"):
            steps.throw(ValueError("one"))
        monkeypatch.undo()
        gpu.fail_next.clear()


# ---- threads and processes


def test_threads_that_open_at_once_share_one_engine_and_one_device(stocked: Path, gpu: Simulator) -> None:
    start, results = threading.Barrier(6), list[Any]()
    with sdopt.load(stocked, backend="tensorrt") as pipe:

        def picture() -> None:
            start.wait()
            results.append((pipe("a red apple", **OPTIONS).images, pipe.engine("unet_step")))

        threads = [threading.Thread(target=picture) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(engine) for _, engine in results}) == 1
        assert len(gpu.streams) == 2
        for images, _ in results:
            np.testing.assert_array_equal(images, results[0][0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_told_that_cuda_does_not_work_there(stocked: Path, gpu: Simulator) -> None:
    with sdopt.load(stocked, backend="tensorrt") as pipe:
        pipe("a red apple", **OPTIONS)
        read, write = os.pipe()
        with device.shared_device().queueing():  # of some other thread, as far as the child can tell
            child = os.fork()
        if not child:
            told = "nothing"
            gpu.calls.clear()
            try:
                pipe("a red apple", **OPTIONS)
            except LostContextError as error:
                told = str(error)
            finally:
                del pipe
                gc.collect()
                os.write(write, f"{told} {gpu.calls}".encode())
                os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        told = os.read(read, 10000).decode()
        os.close(read)
        assert "this process was forked from one that used the GPU" in told
        assert told.endswith(" []")


# ---- what TensorRT-RTX compiles


def test_a_picture_needs_no_cache_of_compiled_kernels(
    tmp_path: Path, plug_in: PlugIn, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = stock(EMOJI_BUNDLE, tmp_path / "bundle", [WIDE], ["vae_decoder"], "tensorrt-rtx")
    opening: Any = lambda: open_engine(Bundle.open(bundle, verify=False), "vae_decoder", "tensorrt-rtx")  # noqa: E731
    plug_in("rtx")
    with opening() as engine:
        expected = engine(latent_sample=LATENTS)["sample"]
    with monkeypatch.context() as patch:  # no home, and no variable that names another folder
        patch.delenv("XDG_CACHE_HOME")
        patch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        plug_in("rtx")
        with opening() as engine:
            np.testing.assert_array_equal(engine(latent_sample=LATENTS)["sample"], expected)
    monkeypatch.setattr("tests.fakes.trt.FakeCache.serialize", lambda cache: None)
    plug_in("rtx")
    with opening() as engine:
        np.testing.assert_array_equal(engine(latent_sample=LATENTS)["sample"], expected)


def test_processes_that_keep_what_they_compiled_at_once_do_not_mix_it(
    tmp_path: Path, plug_in: PlugIn, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes between this one's bytes and its rename."""
    bundle = stock(EMOJI_BUNDLE, tmp_path / "bundle", [WIDE], ["vae_decoder"], "tensorrt-rtx")
    plug_in("rtx")
    replace, names = Path.replace, list[str]()

    def slow(path: Path, target: Any) -> Path:
        names.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", slow)
    for _ in range(2):
        for kept in (own_folders / "cache/sdopt").glob("compiled/*"):
            kept.unlink()
        plug_in("rtx")
        with opened(bundle, backend="tensorrt-rtx") as engine:
            engine(latent_sample=LATENTS)
    of_caches = [name for name in names if ".cache" in name or name.endswith(".tmp")]
    assert len(of_caches) == len(set(of_caches)) == 2


def test_an_engine_whose_kernels_cannot_be_compiled_leaves_nothing(
    tmp_path: Path, plug_in: PlugIn, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = stock(EMOJI_BUNDLE, tmp_path / "bundle", [WIDE], ["vae_decoder"], "tensorrt-rtx")
    plug_in("rtx")
    monkeypatch.setattr(
        "tests.fakes.trt.FakeConfig.set_runtime_cache", lambda config, cache: (_ for _ in ()).throw(RuntimeError("no"))
    )
    with pytest.raises(RuntimeError, match="no"):
        opened(bundle, backend="tensorrt-rtx")
    gc.collect()
    assert device.shared_device().held == {}
