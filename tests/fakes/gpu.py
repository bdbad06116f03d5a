"""`cuda.bindings.runtime` without a GPU: memory is NumPy's, streams are queues, and what CUDA forbids is an error.

The GPU is lazy: what is queued on a stream runs when somebody waits for that stream, and reads staging memory only
then. So code that writes there too early, reads too early, uses the wrong stream, frees what is in use or forgets a
copy gives a wrong picture here, or an error, as it does there. No document promises that cudaFree waits, so it does not
wait here. What is refused, and with which status:

| what                                                             | status                                          |
|------------------------------------------------------------------|-------------------------------------------------|
| more memory than there is: blocks, weights, contexts, graphs      | 2, out of memory                                |
| a handle that is unknown, closed, or of another GPU               | 400, invalid resource handle                    |
| allocating, freeing or waiting inside of a capture                | 900, and the capture is invalid: 901 at its end |
| work on the legacy stream 0 while another stream captures         | 906                                             |
| waiting for an event that was recorded inside of a capture        | 907                                             |
| memory, also the host's, that is not there when it is used        | 700, and the context is lost for good           |

`Simulator.leaks()` tells what is still held; `calls` lists what was asked, in order.
Ref: NVIDIA, CUDA Runtime API 13.0, sections 3.5 (errors), 6.4 (streams), 6.5 (events), 6.29 (graphs).
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from sdopt.bundle.specs import Array

Work = Callable[[], None]
TOTAL = 1 << 30
GRAPH_BYTES, STREAM = 64 << 10, 7
INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE, INVALID_HANDLE = 1, 2, 101, 400
ILLEGAL_ADDRESS, CAPTURE_UNSUPPORTED, CAPTURE_INVALID, CAPTURE_IMPLICIT, CAPTURED_EVENT = 700, 900, 901, 906, 907
TEXTS = {
    INVALID_VALUE: "invalid argument", OUT_OF_MEMORY: "out of memory", INVALID_DEVICE: "invalid device ordinal",
    INVALID_HANDLE: "invalid resource handle", ILLEGAL_ADDRESS: "an illegal memory access was encountered",
    CAPTURE_UNSUPPORTED: "operation not permitted when stream is capturing",
    CAPTURE_INVALID: "operation failed due to a previous error during capture",
    CAPTURE_IMPLICIT: "operation would make the legacy stream depend on a capturing blocking stream",
    CAPTURED_EVENT: "operation not permitted on an event last recorded in a capturing stream",
}  # fmt: skip
NAMES = {  # what the log calls the calls that tests look at
    "cudaMalloc": "malloc", "cudaFree": "free", "cudaGraphLaunch": "launch", "cudaStreamBeginCapture": "capture",
    "cudaEventSynchronize": "wait", "cudaStreamSynchronize": "synchronize", "cudaMemsetAsync": "clear",
}  # fmt: skip
KINDS = {1: "upload", 2: "download", 3: "copy"}
UNTOLD = ("cudaGetDevice", "cudaEventRecord", "cudaGetErrorString", "cudaGetLastError", "cudaMemGetInfo")


class Refused(Exception):  # noqa: N818
    """A call is refused with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(TEXTS.get(status, str(status)))
        self.status = status


@dataclass
class Stream:
    device: int
    queue: list[tuple[int, Work]] = field(default_factory=list)
    captured: list[Work] | None = None
    capture_ok: bool = True


@dataclass
class Event:
    flags: int
    ticket: int = 0  # of the last work before it
    stream: int = 0
    seconds: float = 0.0
    captured: bool = False


class Simulator:
    """One or more GPUs. Its methods with CUDA's names are those of `cuda.bindings.runtime`."""

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaEventDefault, cudaEventBlockingSync, cudaEventDisableTiming = 0, 1, 2  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, total: int = TOTAL, devices: int = 1, name: str = "Fake GPU", capability: str = "9.0") -> None:
        self.total, self.devices, self.name, self.capability = total, devices, name, capability
        self.driver, self.calls = 13000, list[str]()
        self.fail = 0  # a status that every call answers with from now on
        self.fail_next: dict[str, int] = {}  # call -> the status of its next time
        self.full_at: dict[str, range] = {}  # call or what is held -> those of its times that find no memory, from 1 on
        self.counts: dict[str, int] = {}
        self.spins = 0  # waits that keep a core busy, because their event does not block
        self.restores = 0
        self.blocks: dict[int, Array] = {}
        self.pinned: dict[int, Array] = {}
        self.streams: dict[int, Stream] = {0: Stream(0)}
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[Work] | None] = {}
        self.captures: dict[int, list[Work]] = {}  # what was captured, until it is destroyed
        self.held: dict[str, int] = {}  # bytes of weights, contexts and the like, by what holds them
        self._owner: dict[int, int] = {}  # address -> GPU
        self._ticket, self._next, self._handle = 0, 1 << 20, STREAM
        self._lock = RLock()
        self._local = threading.local()

    # ---- what the stand-in for TensorRT uses

    def hold(self, what: str, nbytes: int, device: int = 0) -> bool:
        """Take memory for weights or contexts; False if there is none."""
        if nbytes > self._free(device) or self._is_full_at(what):
            return False
        self.held[what] = self.held.get(what, 0) + nbytes
        return True

    def let_go(self, what: str, nbytes: int) -> None:
        self.held[what] -= nbytes
        if not self.held[what]:
            del self.held[what]

    def compute(self, stream: int, work: Work) -> bool:
        """Queue a kernel; False where the stream does not exist."""
        if stream not in self.streams or (stream == 0 and any(s.captured is not None for s in self.streams.values())):
            return False
        self._queue(stream, work)
        self.calls.append("compute" if self.streams[stream].captured is None else "captured")
        return True

    def capturing(self, stream: int) -> bool:
        return stream in self.streams and self.streams[stream].captured is not None

    def invalidate(self, stream: int) -> None:
        """The capture on a stream is broken, as by a call that is not permitted there."""
        self.streams[stream].capture_ok = False

    def leaks(self) -> dict[str, int]:
        """What is still held, by kind; streams live as long as the process."""
        counts = {
            "device blocks": len(self.blocks), "pinned blocks": len(self.pinned), "graphs": len(self.graphs),
            "events": len(self.events), "captures": len(self.captures), **self.held,
        }  # fmt: skip
        return {kind: count for kind, count in counts.items() if count}

    def at(self, address: int, nbytes: int) -> Array:
        """The bytes at an address; the context is lost if they are not all in one block that is allocated."""
        starts = sorted(self.blocks)
        index = bisect_right(starts, address) - 1
        start = starts[index] if index >= 0 else 0
        block = self.blocks.get(start)
        if block is None or address - start + nbytes > len(block):
            self.lose()
            raise Refused(ILLEGAL_ADDRESS)
        return block[address - start : address - start + nbytes]

    def lose(self, status: int = ILLEGAL_ADDRESS) -> None:
        """Lose the context, as after an illegal address."""
        self.fail = status

    # ---- the runtime's API

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value):
            return value

        def call(*args: Any) -> tuple[Any, ...]:
            with self._lock:
                if name not in UNTOLD:
                    self.calls.append(KINDS[args[3]] if name == "cudaMemcpyAsync" else NAMES.get(name, name))
                full = OUT_OF_MEMORY if self._is_full_at(name) else 0
                status = self.fail_next.pop(name, self.fail or full)
                if status and name == "cudaStreamEndCapture":  # a capture that fails is over too
                    self.streams[int(args[0])].captured = None
                if status and name not in ("cudaGetErrorString", "cudaDriverGetVersion", "cudaRuntimeGetVersion"):
                    return (status, None)
                try:
                    answer = value(*args)
                except Refused as refused:
                    return (refused.status, None)
                return (0, *answer) if isinstance(answer, tuple) else (0,)

        return call

    @property
    def _device(self) -> int:
        return getattr(self._local, "device", 0)

    def cudaDriverGetVersion(self) -> Any:  # noqa: N802
        return (self.driver,)

    def cudaRuntimeGetVersion(self) -> Any:  # noqa: N802
        return (13000,)

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return (self.devices,)

    def cudaGetDevice(self) -> Any:  # noqa: N802
        return (self._device,)

    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        if not 0 <= device < self.devices:
            raise Refused(INVALID_DEVICE)
        self._local.device = device

    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        major, minor = map(int, self.capability.split("."))
        name = f"{self.name} {device}" if device else self.name
        return (SimpleNamespace(name=name.encode(), major=major, minor=minor, totalGlobalMem=self.total),)

    def cudaMemGetInfo(self) -> Any:  # noqa: N802
        return self._free(self._device), self.total

    def cudaGetErrorString(self, status: int) -> Any:  # noqa: N802
        return (TEXTS.get(int(status), "unknown error").encode(),)

    def cudaGetLastError(self) -> Any:  # noqa: N802
        return None

    def cudaMalloc(self, nbytes: int) -> Any:  # noqa: N802
        self._not_in_capture()
        if nbytes > self._free(self._device):
            raise Refused(OUT_OF_MEMORY)
        address, self._next = self._next, self._next + (nbytes + 4095) // 4096 * 4096 + 4096
        self.blocks[address] = np.full(nbytes, 0xFF, np.uint8)  # NaN, until something is written
        self._owner[address] = self._device
        return (address,)

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        self._not_in_capture()
        if address not in self.blocks:
            raise Refused(INVALID_VALUE)
        del self.blocks[address], self._owner[address]

    def cudaMallocHost(self, nbytes: int) -> Any:  # noqa: N802
        self._not_in_capture()
        memory = np.full(max(nbytes, 1), 0xFF, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return (memory.ctypes.data,)

    def cudaFreeHost(self, address: int) -> Any:  # noqa: N802
        self._not_in_capture()
        if address not in self.pinned:
            raise Refused(INVALID_VALUE)
        self.pinned.pop(address).fill(0xFF)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        handle = self._new()
        self.streams[handle] = Stream(self._device)
        return (handle,)

    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        self._not_in_capture()
        self._run(self._stream(stream))

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> Any:  # noqa: N802
        host = {1: source, 2: target}.get(kind)
        if host is not None and self._host(host, nbytes) is None:
            raise Refused(INVALID_VALUE)  # pageable memory: the copy would wait, and sdopt never asks for that

        def copy() -> None:
            memory = None if host is None else self._host(host, nbytes)
            if host is not None and memory is None:
                self.lose()
                raise Refused(ILLEGAL_ADDRESS)
            left = memory if kind == 2 else self.at(target, nbytes)
            right = memory if kind == 1 else self.at(source, nbytes)
            np.copyto(left, right)

        self._queue(stream, copy)

    def cudaMemsetAsync(self, target: int, value: int, nbytes: int, stream: int) -> Any:  # noqa: N802
        self._queue(stream, lambda: self.at(target, nbytes).fill(value))

    def cudaEventCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        handle = self._new()
        self.events[handle] = Event(int(flags))
        return (handle,)

    def cudaEventRecord(self, event: int, stream: int) -> Any:  # noqa: N802
        noted = self._event(event)
        if self._stream(stream).captured is not None:
            noted.captured = True
            return

        def stamp() -> None:
            noted.seconds = time.perf_counter()

        self._queue(stream, stamp)
        noted.ticket, noted.stream, noted.captured = self._ticket, int(stream), False

    def cudaEventSynchronize(self, event: int) -> Any:  # noqa: N802
        self._not_in_capture()
        noted = self._event(event)
        if noted.captured:
            raise Refused(CAPTURED_EVENT)
        self.spins += not noted.flags & self.cudaEventBlockingSync
        if noted.stream in self.streams:
            self._run(self.streams[noted.stream], noted.ticket)

    def cudaEventElapsedTime(self, begin: int, end: int) -> Any:  # noqa: N802
        if any(self._event(e).flags & self.cudaEventDisableTiming for e in (begin, end)):
            raise Refused(INVALID_HANDLE)
        return (1e3 * (self._event(end).seconds - self._event(begin).seconds),)

    def cudaEventDestroy(self, event: int) -> Any:  # noqa: N802
        self._event(event)
        del self.events[int(event)]

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:  # noqa: N802
        found = self._stream(stream)
        if int(stream) == 0 or found.captured is not None:
            raise Refused(CAPTURE_UNSUPPORTED)
        found.captured, found.capture_ok = [], True

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        found = self._stream(stream)
        if found.captured is None:
            raise Refused(INVALID_VALUE)
        work, found.captured = found.captured, None
        if not found.capture_ok:
            raise Refused(CAPTURE_INVALID)
        handle = self._new()
        self.captures[handle] = work
        return (handle,)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:  # noqa: N802
        if not self.hold("graphs' memory", GRAPH_BYTES, self._device):
            raise Refused(OUT_OF_MEMORY)
        handle = self._new()
        self.graphs[handle] = self.captures[graph]
        return (handle,)

    def cudaGraphDestroy(self, graph: Any) -> Any:  # noqa: N802
        del self.captures[graph]

    def cudaGraphUpload(self, graph: int, stream: int) -> Any:  # noqa: N802
        self._graph(graph)
        self._stream(stream)

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:  # noqa: N802
        work = self._graph(graph)
        if self._stream(stream).captured is not None:
            raise Refused(CAPTURE_UNSUPPORTED)
        for step in work:
            self._queue(stream, step)

    def cudaGraphExecDestroy(self, graph: int) -> Any:  # noqa: N802
        self._graph(graph)
        del self.graphs[int(graph)]
        self.let_go("graphs' memory", GRAPH_BYTES)

    # ---- inside

    def _free(self, device: int) -> int:
        taken = sum(len(b) for a, b in self.blocks.items() if self._owner[a] == device)
        return self.total - taken - (sum(self.held.values()) if device == 0 else 0)

    def _is_full_at(self, what: str) -> bool:
        self.counts[what] = self.counts.get(what, 0) + 1
        return self.counts[what] in self.full_at.get(what, ())

    def _new(self) -> int:
        self._handle += 1
        return self._handle

    def _stream(self, handle: int) -> Stream:
        stream = self.streams.get(int(handle))
        if stream is None or stream.device != self._device:
            raise Refused(INVALID_HANDLE)
        return stream

    def _event(self, handle: int) -> Event:
        if int(handle) not in self.events:
            raise Refused(INVALID_HANDLE)
        return self.events[int(handle)]

    def _graph(self, handle: int) -> list[Work]:
        work = self.graphs.get(int(handle))
        if work is None:
            raise Refused(INVALID_HANDLE)
        return work

    def _host(self, address: int, nbytes: int) -> Array | None:
        """The page-locked bytes at an address."""
        for start, block in self.pinned.items():
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        return None

    def _not_in_capture(self) -> None:
        for stream in self.streams.values():
            if stream.captured is not None:
                stream.capture_ok = False
                raise Refused(CAPTURE_UNSUPPORTED)

    def _queue(self, stream: int, work: Work) -> None:
        found = self._stream(stream)
        if int(stream) == 0 and any(s.captured is not None for s in self.streams.values()):
            raise Refused(CAPTURE_IMPLICIT)
        if found.captured is not None:
            found.captured.append(work)
            return
        self._ticket += 1
        found.queue.append((self._ticket, work))

    def _run(self, stream: Stream, until: int | None = None) -> None:
        """Run what was queued on a stream, up to the work of this number."""
        while stream.queue and (until is None or stream.queue[0][0] <= until):
            stream.queue.pop(0)[1]()


def as_module(simulator: Simulator) -> ModuleType:
    """A module that is `cuda.bindings.runtime` to the code under test."""
    module = ModuleType("cuda.bindings.runtime")
    module.__getattr__ = lambda name: getattr(simulator, name)  # type: ignore[method-assign]
    module.__dict__["simulator"] = simulator
    return module
