"""What is missing for CUDA is told apart, errors by what can still be done, and every call is made as the API asks."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdopt.engine import cuda, cuda_errors
from sdopt.engine.cuda import open_cuda
from sdopt.engine.cuda_errors import CaptureError, CudaError, LostContextError, OutOfMemoryError, check
from sdopt.errors import BackendError
from tests.fakes.gpu import Simulator

CONSTANTS = {
    "cudaMemcpyKind": SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3),
    "cudaStreamCaptureMode": SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
    "cudaStreamNonBlocking": 1,
    "cudaEventDisableTiming": 2,
    "cudaEventBlockingSync": 1,
}


class Runtime:
    """cuda.bindings.runtime as it answers here: a tuple of a status and the values."""

    def __init__(self, driver: int = 13000, devices: int = 1, status: int = 0, **answers: Any) -> None:
        self.driver, self.devices, self.status, self.answers = driver, devices, status, answers
        self.calls: list[tuple[Any, ...]] = []
        self.__dict__ |= CONSTANTS

    def cudaDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802
        return 0, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:  # noqa: N802
        return 0, 13050

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return self.status, self.devices

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"told by the driver"

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:  # noqa: N802
        return 0, SimpleNamespace(name=b"NVIDIA H200", major=9, minor=0, totalGlobalMem=150 << 30)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            answer = self.answers.get(name, 0)
            return answer if isinstance(answer, tuple) else (answer,)

        return call


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (Runtime(driver=0), "there is no NVIDIA driver.*driver 580 or newer .*--backend ort"),
        (
            Runtime(driver=12080),
            r"offers CUDA 12.8, cuda-bindings needs 13.0 or newer: update to driver 580 .*cuda-bindings<13",
        ),
        (Runtime(devices=0, status=100), "shows no GPU to this process; see CUDA_VISIBLE_DEVICES"),
        (Runtime(devices=0), "shows no GPU to this process"),
        (Runtime(status=999), "cudaGetDeviceCount: CUDA error 999, told by the driver"),
    ],
    ids=["driver", "old", "hidden", "none", "other"],
)
def test_each_lack_has_its_own_sentence(runtime: Runtime, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        open_cuda(runtime=runtime)


def test_a_gpu_that_is_not_there_is_refused_by_its_number() -> None:
    with pytest.raises(BackendError, match="there is no GPU 2; this process sees 1"):
        open_cuda(2, Runtime())


def test_without_cuda_bindings_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match="pip install cuda-bindings"):
        open_cuda()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (2, OutOfMemoryError),
        (900, CaptureError),
        (1, CudaError),
        *((c, LostContextError) for c in cuda_errors.LOST_CONTEXT),
    ],
)
def test_an_error_says_what_can_still_be_done(code: int, kind: type[CudaError]) -> None:
    with pytest.raises(CudaError, match=f"cudaThis: CUDA error {code}, told by the driver") as caught:
        check(Runtime(), (code, None), "cudaThis")
    assert type(caught.value) is kind
    if kind is LostContextError:
        assert "start a new one" in str(caught.value)


def test_the_gpu_is_described() -> None:
    gpu = open_cuda(runtime=Runtime()).gpu
    assert (gpu.name, gpu.compute_capability, gpu.driver) == ("NVIDIA H200", "9.0", 13000)


def test_calls_are_made_as_the_api_asks() -> None:
    runtime = Runtime(
        cudaStreamCreateWithFlags=(0, 7), cudaMalloc=(0, 4096), cudaMemGetInfo=(0, 5, 9),
        cudaEventCreateWithFlags=(0, 8),        cudaStreamEndCapture=(0, 11), cudaGraphInstantiate=(0, 12),
    )  # fmt: skip
    gpu = open_cuda(runtime=runtime)
    stream, event = gpu.stream(), gpu.event()
    array = np.zeros(4, np.float32)
    runtime.calls.clear()
    assert gpu.malloc(100) == 4096
    gpu.upload(4096, array, stream)
    gpu.download(array, 4096, stream)
    gpu.copy(1, 2, 3, stream)
    gpu.clear(4096, 16, stream)
    graph = gpu.capture(lambda: gpu.record(event, stream), stream)
    gpu.launch(graph, stream)
    gpu.wait(event)
    gpu.synchronize(stream)
    assert gpu.memory() == (5, 9)
    gpu.drop(graph)
    gpu.free(4096)
    host = array.ctypes.data
    assert runtime.calls == [
        ("cudaMalloc", 100), ("cudaMemcpyAsync", 4096, host, 16, 1, 7), ("cudaMemcpyAsync", host, 4096, 16, 2, 7),
        ("cudaMemcpyAsync", 1, 2, 3, 3, 7), ("cudaMemsetAsync", 4096, 0, 16, 7), ("cudaStreamBeginCapture", 7, 1),
        ("cudaEventRecord", 8, 7), ("cudaStreamEndCapture", 7), ("cudaGraphInstantiate", 11, 0),
        ("cudaGraphDestroy", 11), ("cudaGraphUpload", 12, 7), ("cudaGraphLaunch", 12, 7), ("cudaEventSynchronize", 8),
        ("cudaStreamSynchronize", 7), ("cudaMemGetInfo",), ("cudaGraphExecDestroy", 12), ("cudaFree", 4096),
    ]  # fmt: skip


def test_a_capture_that_fails_leaves_capture_again() -> None:
    runtime = Runtime(cudaStreamCreateWithFlags=(0, 7), cudaMemcpyAsync=900)
    gpu = open_cuda(runtime=runtime)
    stream = gpu.stream()
    with pytest.raises(CaptureError):
        gpu.capture(lambda: gpu.copy(1, 2, 3, stream), stream)
    assert ("cudaStreamEndCapture", 7) in runtime.calls


@pytest.mark.parametrize("call", ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphUpload"])
def test_a_capture_that_fails_late_is_told_once_and_leaves_no_graph(call: str) -> None:
    gpu = Simulator()
    cuda_ = open_cuda(runtime=gpu)
    with cuda_.current():
        stream = cuda_.stream()
        gpu.fail_next[call] = 901
        with pytest.raises(CaptureError):
            cuda_.capture(lambda: None, stream)
    assert gpu.leaks() == {}
    cuda_.synchronize(stream)


def test_the_gpu_is_current_only_inside() -> None:
    gpu = Simulator(devices=2)
    second = open_cuda(1, gpu)
    assert gpu.cudaGetDevice() == (0, 0)
    with second.current(), second.current():
        assert gpu.cudaGetDevice() == (0, 1)
    assert gpu.cudaGetDevice() == (0, 0)
    with pytest.raises(ZeroDivisionError), second.current():
        _ = 1 / 0
    assert gpu.cudaGetDevice() == (0, 0)


def test_events_wait_asleep_and_timing_events_tell_seconds() -> None:
    gpu = Simulator()
    cuda_ = open_cuda(runtime=gpu)
    stream, done = cuda_.stream(), cuda_.event()
    begin, end = cuda_.timing_event(), cuda_.timing_event()
    cuda_.record(begin, stream)
    gpu.compute(stream, lambda: time.sleep(0.01))
    cuda_.record(end, stream)
    cuda_.record(done, stream)
    for event in (done, end):
        cuda_.wait(event)
    assert 0.01 <= cuda_.elapsed(begin, end) < 1
    assert gpu.spins == 0
    with pytest.raises(CudaError, match="invalid resource handle"):
        cuda_.elapsed(begin, done)


def test_no_page_locked_memory_is_not_blamed_on_the_gpu() -> None:
    gpu = Simulator()
    gpu.fail_next["cudaMallocHost"] = 2
    with pytest.raises(CudaError, match=r"no 1.00 MB of page-locked memory"):
        open_cuda(runtime=gpu).pinned(1_000_000)


def test_the_real_bindings_have_every_call_that_we_make() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    import ast
    from pathlib import Path

    tree = ast.parse(Path(cuda.__file__).read_text())
    names = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and str(n.value).startswith("cuda")}
    names = {n for n in names if n.isidentifier() and n != "cuda"}
    assert len(names) > 20
    assert not [name for name in names if not hasattr(runtime, name)]
