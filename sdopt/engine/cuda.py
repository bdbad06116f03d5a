"""CUDA: memory, streams and graphs of one GPU. Only this module and `cuda_errors` call the CUDA runtime.

    cuda = open_cuda()                       # checks driver and GPU; what is missing has its own error text
    stream = cuda.stream()
    cuda.upload(address, pinned, stream)     # all work is queued; `synchronize` waits for it

The engines use only what the protocol `Cuda` declares, so a fake with NumPy memory can replace the GPU.
Ref: NVIDIA, CUDA Runtime API, sections 6.9 (memory) and 6.30 (graphs).
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from sdopt.bundle.disk import bytes_text
from sdopt.bundle.specs import Array
from sdopt.dataclass import dataclass
from sdopt.engine.cuda_errors import CudaError, OutOfMemoryError, check
from sdopt.errors import BackendError

NO_DEVICE = 100  # cudaErrorNoDevice
OLDEST_DRIVER = 12000
# The oldest driver for all releases of a major version of CUDA. Ref: NVIDIA, CUDA Compatibility, Table 1
DRIVERS = {12: 525, 13: 580}


@dataclass(frozen=True)
class Gpu:
    """One GPU and its driver. `memory` is in bytes; `driver` is 13000 for CUDA 13.0."""

    index: int
    name: str
    compute_capability: str
    driver: int
    memory: int


class Cuda(Protocol):
    """What engines ask of a GPU. Addresses and handles are integers; work is queued on a stream."""

    gpu: Gpu

    def current(self) -> AbstractContextManager[None]:
        """Make this GPU the calling thread's current one; afterwards the one before it is current again."""
        ...

    def malloc(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def pinned(self, nbytes: int) -> Array:
        """Page-locked host memory as bytes, for copies that do not wait; `unpin` frees it."""
        ...

    def unpin(self, memory: Array) -> None: ...
    def stream(self) -> int: ...
    def upload(self, target: int, source: Array, stream: int) -> None: ...
    def download(self, target: Array, source: int, stream: int) -> None: ...
    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None: ...
    def clear(self, target: int, nbytes: int, stream: int) -> None: ...
    def synchronize(self, stream: int) -> None: ...
    def event(self) -> int:
        """An event that a thread can wait for without keeping a core busy."""
        ...

    def timing_event(self) -> int:
        """An event that records when the GPU reaches it; see `elapsed`."""
        ...

    def record(self, event: int, stream: int) -> None: ...
    def wait(self, event: int) -> None: ...
    def elapsed(self, begin: int, end: int) -> float:
        """Seconds on the GPU between two timing events. It must have reached both."""
        ...

    def capture(self, work: Callable[[], None], stream: int) -> int:
        """A graph of what `work` queues on `stream`, which does not run yet."""
        ...

    def launch(self, graph: int, stream: int) -> None: ...
    def drop(self, graph: int) -> None: ...
    def drop_event(self, event: int) -> None: ...
    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        ...


def open_cuda(index: int = 0, runtime: Any = None) -> CudaBindings:
    """The GPU `index`. Tests give another `runtime`; the default is cuda.bindings.runtime.

    Raises: BackendError where cuda-bindings, the driver or the GPU is missing, or the driver is too old.
    """
    runtime = runtime or _bindings()
    _, driver = runtime.cudaDriverGetVersion()
    _, built_for = runtime.cudaRuntimeGetVersion()
    oldest = max(OLDEST_DRIVER, built_for // 1000 * 1000)
    major = oldest // 1000
    needed = f"{DRIVERS[major]} or newer" if major in DRIVERS else f"of CUDA {major}"
    if not driver:
        raise BackendError(
            f"there is no NVIDIA driver on this machine; needed is driver {needed} "
            "(in a container: on the host, and start it with --gpus all); without a GPU use --backend ort"
        )
    if driver < oldest:
        raise BackendError(
            f"the NVIDIA driver offers CUDA {_version(driver)}, cuda-bindings needs {_version(oldest)} or newer: "
            f'update to driver {needed}, or pip install "cuda-bindings<{major}"'
        )
    status, count = runtime.cudaGetDeviceCount()
    if int(status) == NO_DEVICE or (not int(status) and not count):
        raise BackendError("the driver shows no GPU to this process; see CUDA_VISIBLE_DEVICES and nvidia-smi")
    check(runtime, (status,), "cudaGetDeviceCount")
    if not 0 <= index < count:
        raise BackendError(f"there is no GPU {index}; this process sees {count}, counted from 0")
    return CudaBindings(runtime, index, driver)


def sees_gpu() -> bool:
    """Whether an NVIDIA driver is here and shows this process a GPU. The driver itself is asked; no package is needed.

    Ref: NVIDIA, CUDA Driver API, cuInit and cuDeviceGetCount.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) and count.value > 0


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(f"cuda-bindings is not installed ({error}): pip install cuda-bindings") from error


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class CudaBindings:
    """`Cuda` over cuda.bindings.runtime."""

    def __init__(self, runtime: Any, index: int, driver: int) -> None:
        self._rt, self._index = runtime, index
        properties = self._do("cudaGetDeviceProperties", index)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        capability = f"{properties.major}.{properties.minor}"
        self.gpu = Gpu(index, name, capability, driver, int(properties.totalGlobalMem))
        kinds = runtime.cudaMemcpyKind
        self._to_device, self._to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._within = kinds.cudaMemcpyDeviceToDevice
        self._mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._handles: dict[int, Any] = {}  # integer -> the bindings' stream, event or graph

    @contextmanager
    def current(self) -> Generator[None]:
        before = int(self._do("cudaGetDevice"))
        if before == self._index:
            yield
            return
        self._do("cudaSetDevice", self._index)
        try:
            yield
        finally:
            self._rt.cudaSetDevice(before)

    def _do(self, name: str, *args: Any) -> Any:
        return check(self._rt, getattr(self._rt, name)(*args), name)

    def _keep(self, handle: Any) -> int:
        self._handles[int(handle)] = handle
        return int(handle)

    def malloc(self, nbytes: int) -> int:
        try:
            return int(self._do("cudaMalloc", nbytes))
        except OutOfMemoryError:
            self._rt.cudaGetLastError()  # else the next call would report the same error
            raise

    def free(self, address: int) -> None:
        self._do("cudaFree", address)

    def pinned(self, nbytes: int) -> Array:
        try:
            address = int(self._do("cudaMallocHost", nbytes))
        except OutOfMemoryError as error:
            self._rt.cudaGetLastError()
            raise CudaError(
                f"this machine has no {bytes_text(nbytes)} of page-locked memory: {error}. Close other programs, or "
                "make smaller pictures or fewer at once"
            ) from error
        memory: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        return np.frombuffer(memory, np.uint8)

    def unpin(self, memory: Array) -> None:
        self._do("cudaFreeHost", memory.ctypes.data)

    def stream(self) -> int:
        return self._keep(self._do("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def upload(self, target: int, source: Array, stream: int) -> None:
        self._move(target, source.ctypes.data, source.nbytes, self._to_device, stream)

    def download(self, target: Array, source: int, stream: int) -> None:
        self._move(target.ctypes.data, source, target.nbytes, self._to_host, stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._move(target, source, nbytes, self._within, stream)

    def _move(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> None:
        self._do("cudaMemcpyAsync", target, source, nbytes, kind, self._handles[stream])

    def clear(self, target: int, nbytes: int, stream: int) -> None:
        self._do("cudaMemsetAsync", target, 0, nbytes, self._handles[stream])

    def synchronize(self, stream: int) -> None:
        self._do("cudaStreamSynchronize", self._handles[stream])

    def event(self) -> int:
        flags = self._rt.cudaEventDisableTiming | self._rt.cudaEventBlockingSync
        return self._keep(self._do("cudaEventCreateWithFlags", flags))

    def timing_event(self) -> int:
        return self._keep(self._do("cudaEventCreateWithFlags", self._rt.cudaEventBlockingSync))

    def elapsed(self, begin: int, end: int) -> float:
        return float(self._do("cudaEventElapsedTime", self._handles[begin], self._handles[end])) / 1e3

    def record(self, event: int, stream: int) -> None:
        self._do("cudaEventRecord", self._handles[event], self._handles[stream])

    def wait(self, event: int) -> None:
        self._do("cudaEventSynchronize", self._handles[event])

    def drop_event(self, event: int) -> None:
        self._do("cudaEventDestroy", self._handles.pop(event))

    def capture(self, work: Callable[[], None], stream: int) -> int:
        handle = self._handles[stream]
        self._do("cudaStreamBeginCapture", handle, self._mode)
        try:
            work()
        except BaseException:
            status, *graph = self._rt.cudaStreamEndCapture(handle)  # the stream must leave capture
            if not int(status):  # `work` failed and CUDA did not: there is a graph to destroy
                self._rt.cudaGraphDestroy(*graph)
            self._rt.cudaGetLastError()
            raise
        try:
            graph = self._do("cudaStreamEndCapture", handle)
        except CudaError:
            self._rt.cudaGetLastError()  # else the next call would report the same error
            raise
        try:
            executable = self._do("cudaGraphInstantiate", graph, 0)
        finally:
            self._do("cudaGraphDestroy", graph)
        kept = self._keep(executable)
        try:
            self._do("cudaGraphUpload", executable, handle)
        except CudaError:
            self.drop(kept)
            raise
        return kept

    def launch(self, graph: int, stream: int) -> None:
        self._do("cudaGraphLaunch", self._handles[graph], self._handles[stream])

    def drop(self, graph: int) -> None:
        self._do("cudaGraphExecDestroy", self._handles.pop(graph))

    def memory(self) -> tuple[int, int]:
        free, total = self._do("cudaMemGetInfo")
        return int(free), int(total)
