"""A GPU of NumPy arrays, and a TensorRT whose plans are ONNX graphs that ONNX Runtime runs in its memory.

The GPU is as lazy as a real one: what is queued runs when somebody waits, and reads staging memory only then. So code
that writes there too early, reads too early, frees what is in use or forgets a copy gives a wrong picture here as it
does there.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

from sdopt.engine.cuda import CaptureError, Gpu, LostContextError, OutOfMemoryError
from sdopt.engine.trt_api import SEVERITIES
from sdopt.specs import Array

Work = Callable[[], None]
TOTAL = 1 << 30


class FakeCuda:
    """`sdopt.engine.cuda.Cuda` in NumPy; `calls` lists what was asked, in order."""

    def __init__(self, total: int = TOTAL) -> None:
        self.gpu = Gpu(0, "Fake GPU", "9.0", 13000, total)
        self.calls: list[str] = []
        self._lock = RLock()  # a real one takes calls of several threads
        self.blocks: dict[int, Array] = {}
        self.pinned_blocks: dict[int, Array] = {}
        self.capturable = True
        self.fail: Exception | None = None
        self._next, self._handle = 1 << 20, 0
        self._queue: list[Work] = []
        self._captured: list[Work] | None = None
        self._graphs: dict[int, list[Work]] = {}
        self._events: dict[int, int] = {}  # event -> how much of all that was ever queued stands before it
        self._done = 0

    def use(self) -> None:
        self.calls.append("use")
        if self.fail is not None:
            raise self.fail

    def malloc(self, nbytes: int) -> int:
        self.calls.append("malloc")
        if nbytes > self.memory()[0]:
            raise OutOfMemoryError("cudaMalloc: CUDA error 2, out of memory")
        address, self._next = self._next, self._next + (nbytes + 4095) // 4096 * 4096 + 4096
        self.blocks[address] = np.full(nbytes, 0xFF, np.uint8)  # NaN, until something is written
        return address

    def free(self, address: int) -> None:
        self.calls.append("free")
        self._run(self._all())
        del self.blocks[address]

    def pinned(self, nbytes: int) -> Array:
        memory = np.full(nbytes, 0xFF, np.uint8)
        self.pinned_blocks[memory.ctypes.data] = memory
        return memory

    def unpin(self, memory: Array) -> None:
        del self.pinned_blocks[memory.ctypes.data]

    def at(self, address: int, nbytes: int) -> Array:
        """The bytes at an address; an error if they are not all in one block that is allocated."""
        starts = sorted(self.blocks)
        start = starts[bisect_right(starts, address) - 1]
        block = self.blocks[start]
        assert address - start + nbytes <= len(block), "an access beyond what was allocated"
        return block[address - start : address - start + nbytes]

    def stream(self) -> int:
        return self._new()

    def event(self) -> int:
        return self._new()

    def drop_event(self, event: int) -> None:
        self._events.pop(event, None)

    def upload(self, target: int, source: Array, stream: int) -> None:
        assert any(b.ctypes.data <= source.ctypes.data < b.ctypes.data + len(b) for b in self.pinned_blocks.values())
        self._enqueue("upload", lambda: np.copyto(self.at(target, source.nbytes), source))

    def download(self, target: Array, source: int, stream: int) -> None:
        self._enqueue("download", lambda: np.copyto(target, self.at(source, target.nbytes)))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._enqueue("copy", lambda: np.copyto(self.at(target, nbytes), self.at(source, nbytes)))

    def clear(self, target: int, nbytes: int, stream: int) -> None:
        self._enqueue("clear", lambda: self.at(target, nbytes).fill(0))

    def compute(self, work: Work) -> None:
        """Queue the run of an engine."""
        self._enqueue("compute", work)

    def record(self, event: int, stream: int) -> None:
        self._events[event] = self._all()

    def wait(self, event: int) -> None:
        self.calls.append("wait")
        self._run(self._events.get(event, 0))

    def synchronize(self, stream: int) -> None:
        self.calls.append("synchronize")
        self._run(self._all())

    def capture(self, work: Callable[[], None], stream: int) -> int:
        if not self.capturable:
            raise CaptureError("cudaStreamEndCapture: CUDA error 900")
        self.calls.append("capture")
        self._captured = []
        try:
            work()
            captured = self._captured
        finally:
            self._captured = None
        graph = self._new()
        self._graphs[graph] = captured
        return graph

    def launch(self, graph: int, stream: int) -> None:
        with self._lock:
            self._queue.extend(self._graphs[graph])
        self.calls.append("launch")

    def drop(self, graph: int) -> None:
        del self._graphs[graph]

    def memory(self) -> tuple[int, int]:
        return self.gpu.memory - sum(map(len, self.blocks.values())), self.gpu.memory

    def lose(self) -> None:
        """Lose the context, as after an illegal address."""
        self.fail = LostContextError("cudaStreamSynchronize: CUDA error 700, an illegal memory access")

    def _all(self) -> int:
        with self._lock:
            return self._done + len(self._queue)

    def _new(self) -> int:
        self._handle += 1
        return self._handle

    def _enqueue(self, name: str, work: Work) -> None:
        if self._captured is not None:
            self._captured.append(work)
        else:
            self.calls.append(name)
            with self._lock:
                self._queue.append(work)

    def _run(self, until: int) -> None:
        """Run what was queued, up to the work of this number."""
        with self._lock:
            while self._done < until and self._queue:
                self._queue.pop(0)()
                self._done += 1


class DataType(IntEnum):
    FLOAT, HALF, INT32, INT64, BOOL = 0, 1, 3, 8, 4


class TensorIOMode(IntEnum):
    INPUT, OUTPUT = 1, 2


TYPES = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int32)": DataType.INT32}
NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT32: np.int32}


def fake_tensorrt(cuda: FakeCuda, modern: bool = True) -> ModuleType:
    """A module that is TensorRT 10's to `sdopt.engine.trt_api`, or 8.6's if not `modern`."""
    trt = ModuleType("tensorrt")
    trt.__spec__ = ModuleSpec("tensorrt", None)
    trt.__dict__.update(
        __version__="fake",
        ILogger=type("ILogger", (), {name: i for i, name in enumerate(SEVERITIES)}),
        Runtime=lambda log: FakeRuntime(cuda, modern),
    )  # fmt: skip
    if modern:
        trt.__dict__["ExecutionContextAllocationStrategy"] = IntEnum("Strategy", {"USER_MANAGED": 2})
    return trt


class FakeRuntime:
    def __init__(self, cuda: FakeCuda, modern: bool) -> None:
        self._cuda, self._modern = cuda, modern

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        entry = json.loads(bytes(plan))
        kind = FakeEngine if self._modern else OldEngine
        return kind(self._cuda, Path(entry["graph"]), entry["profiles"])


def fake_plan(graph: Path, profiles: list[dict[str, list[tuple[int, ...]]]]) -> bytes:
    """The bytes of a plan: a graph, and for each profile the smallest, best and largest shape of each input."""
    return json.dumps({"graph": str(graph), "profiles": profiles}).encode()


class _Engine:
    """What both generations have."""

    def __init__(self, cuda: FakeCuda, graph: Path, profiles: Any) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.cuda, self.profiles = cuda, profiles
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = {n.name: n for n in self.session.get_inputs()}
        self.outputs = {n.name: n for n in self.session.get_outputs()}
        self.tensors = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(profiles)

    def get_tensor_name(self, i: int) -> str:
        return self.tensors[i]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[{**self.inputs, **self.outputs}[name].type]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile][name]


class FakeEngine(_Engine):
    device_memory_size_v2 = 5000

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy.name == "USER_MANAGED"
        return FakeContext(self)


class OldEngine(_Engine):
    device_memory_size = 5000

    def create_execution_context_without_device_memory(self) -> Any:
        return OldContext(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.addresses = engine, dict[str, int]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.memory = (0, 0)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            zeros = {n: np.zeros(s, NUMPY[self.engine.get_tensor_dtype(n)]) for n, s in self.shapes.items()}
            outputs = self.engine.session.run(list(self.engine.outputs), zeros)
            self.shapes |= {n: o.shape for n, o in zip(self.engine.outputs, outputs, strict=True)}
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        addresses, memory = dict(self.addresses), self.memory
        self.engine.cuda.compute(lambda: self._run(addresses, memory))
        return True

    def _run(self, addresses: dict[str, int], memory: tuple[int, int]) -> None:
        self.engine.cuda.at(*memory).fill(0x7F)  # scratch memory is scratched
        given = {n: self._array(n, addresses) for n in self.engine.inputs}
        outputs = self.engine.session.run(list(self.engine.outputs), given)
        for name, array in zip(self.engine.outputs, outputs, strict=True):
            np.copyto(self._array(name, addresses), array)

    def _array(self, name: str, addresses: dict[str, int]) -> Array:
        dtype = np.dtype(NUMPY[self.engine.get_tensor_dtype(name)])
        shape = self.get_tensor_shape(name)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return self.engine.cuda.at(addresses[name], nbytes).view(dtype).reshape(shape)


class FakeContext(_Context):
    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 * self.shapes[next(iter(self.shapes))][0]

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.memory = (address, nbytes)


class OldContext(_Context):
    @property
    def device_memory(self) -> int:
        return self.memory[0]

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        self.memory = (address, OldEngine.device_memory_size)
