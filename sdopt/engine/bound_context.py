"""An execution context with all that it needs to run at one set of shapes: addresses, staging memory, a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from sdopt.bundle.specs import Array, TensorSpec
from sdopt.dataclass import dataclass
from sdopt.engine.cuda_errors import LostContextError
from sdopt.engine.device import Device, rounded
from sdopt.engine.trt_api import Context
from sdopt.errors import BackendError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where one tensor is: `offset` bytes into the context's memory, on the GPU and in the staging copy."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    dtype_of_caller: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Feed:
    """A copy from an output to the input of another context: two addresses on the GPU."""

    source: int
    target: int
    nbytes: int


class Memory:
    """A buffer on the GPU and a page-locked one of the same size on the host, its staging. They never shrink."""

    def __init__(self, device: Device, owner: str) -> None:
        self.device, self.owner = device, owner
        self.address, self.nbytes = 0, 0
        self.staging: Array = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Make the buffer at least `nbytes` large. If it grows, its content is lost."""
        if nbytes <= self.nbytes:
            return
        if self.address:
            self.device.cuda.synchronize(self.device.stream)
            self.free()
        address = self.device.allocate(self.owner, nbytes)
        try:
            self.staging = self.device.cuda.pinned(nbytes)
        except BaseException:
            self.device.free(self.owner, address, nbytes)
            raise
        self.address, self.nbytes = address, nbytes

    def free(self) -> None:
        """Free both buffers. Nothing that is queued may still use them."""
        if self.address:
            self.device.free(self.owner, self.address, self.nbytes)
            self.device.cuda.unpin(self.staging)
        self.address, self.nbytes = 0, 0

    def upload(self, offset: int, array: Array, target: int | None = None) -> None:
        """Queue the upload of `array` through staging at `offset`, to the same offset or to the address `target`.

        Nobody may write there until the GPU has read it.
        """
        staged = self.staging[offset : offset + array.nbytes]
        placed: Array = cast(Any, staged).view(array.dtype).reshape(array.shape)
        np.copyto(placed, array)
        self.device.cuda.upload(self.address + offset if target is None else target, staged, self.device.stream)


class BoundContext:
    """An execution context whose tensors are bound for one set of shapes. Its methods need the device's lock.

    The first launch enqueues the engine without a graph, because TensorRT does some of its work late. The second launch
    captures a CUDA graph, and it and all later ones launch that graph. So a component that is called once captures
    nothing. If the scratch memory moves, because another engine needs more, or if `feed` adds a copy, then the next two
    launches do the same again.
    """

    def __init__(
        self,
        device: Device,
        owner: str,
        context: Context,
        profile: int,
        inputs: Mapping[str, tuple[TensorSpec, tuple[int, ...], str]],
        outputs: Mapping[str, tuple[TensorSpec, str]],
        carry: Mapping[str, str],
    ) -> None:
        self.device, self.owner, self.context, self._carry = device, owner, context, carry
        self._scratch = context.prepare(profile, {n: shape for n, (_, shape, _) in inputs.items()}, device.stream)
        tensors = {name: (shape, dtype, spec.dtype) for name, (spec, shape, dtype) in inputs.items()}
        tensors |= {name: (context.shape(name), dtype, spec.dtype) for name, (spec, dtype) in outputs.items()}
        self.inputs, self.places, total = tuple(inputs), dict[str, Place](), 0
        for name, (shape, dtype, dtype_of_caller) in tensors.items():
            if any(length < 0 for length in shape):
                raise BackendError(f"{owner}: the engine cannot tell the shape of {name!r} before it runs")
            self.places[name] = Place(total, shape, np.dtype(dtype), dtype_of_caller)
            total += rounded(self.places[name].nbytes)
        self.tensors, self.tables = Memory(device, owner), Memory(device, owner)
        self.streamed: dict[str, Memory] = {}  # input of `stream_in` -> one place for each call
        self._epoch, self._graph = -1, 0
        self._capturable = True  # False once a capture was refused
        self.feeds: tuple[Feed, ...] = ()  # copies to other contexts after each launch
        self._graph_feeds: tuple[Feed, ...] = ()  # those that the graph holds
        self._rows: dict[str, tuple[int, int]] = {}  # input -> (offset of its table, bytes of a row)
        self._calls = 0  # how many calls `stream_in` makes room for
        self._filled: set[tuple[str, int]] = set()  # (input, call) that the GPU may not have read yet
        self.uploaded = self.done = 0  # events: staging memory was read; outputs were downloaded
        self.closed = False
        try:
            self.uploaded = device.cuda.event()
            self.done = device.cuda.event()
            self.tensors.reserve(total)
            for name, place in self.places.items():
                context.bind(name, self.tensors.address + place.offset)
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> int:
        return self.tensors.address + self.places[name].offset

    def clear(self) -> None:
        """Fill every input with zeros, and forget the tables."""
        for name in self.inputs:
            self.device.cuda.clear(self.address(name), self.places[name].nbytes, self.device.stream)
        self._rows, self._calls = {}, 0

    def put(self, name: str, array: Array) -> None:
        """Queue the upload of an input. `settle` must come before its staging place is written again."""
        self.tensors.upload(self.places[name].offset, self._as_placed(name, array))
        self.device.cuda.record(self.uploaded, self.device.stream)

    def _as_placed(self, name: str, array: Array) -> Array:
        """`array`, contiguous and in the type of its input.

        Raises: UsageError for an unknown input, and for another shape: it would overwrite other tensors.
        """
        if name not in self.inputs:
            raise UsageError(f"{self.owner}: unknown input {name}; it takes {', '.join(self.inputs)}")
        place = self.places[name]
        if array.shape != place.shape:
            raise UsageError(f"{self.owner} input {name!r}: got {list(array.shape)}; this run has {list(place.shape)}")
        return np.ascontiguousarray(array, place.dtype)

    def feed(self, output: str, to: BoundContext, name: str) -> None:
        """From now on each launch copies `output` to input `name` of another context on this device.

        Raises: UsageError for unknown tensors, and for two that differ in shape or dtype.
        """
        _check_known(self.owner, output, set(self.places) - set(self.inputs))
        _check_known(to.owner, name, set(to.inputs))
        source, target = self.places[output], to.places[name]
        if (source.shape, source.dtype) != (target.shape, target.dtype):
            raise UsageError(
                f"{self.owner} gives {output} {source.dtype} {list(source.shape)}; {to.owner} takes {name} "
                f"{target.dtype} {list(target.shape)}"
            )
        self.feeds = (*self.feeds, Feed(self.address(output), to.address(name), source.nbytes))

    def settle(self) -> None:
        """Wait until the GPU has read what `put` left in staging memory."""
        self.device.wait(self.uploaded)

    def put_tables(self, tables: Mapping[str, Array], calls: int) -> None:
        """Queue the upload of the rows of all calls. `stream_in` will make room for this many calls."""
        placed = {name: np.ascontiguousarray(table, self.places[name].dtype) for name, table in tables.items()}
        self.tables.reserve(sum(rounded(table.nbytes) for table in placed.values()))
        offset = 0
        for name, table in placed.items():
            self.tables.upload(offset, table)
            self._rows[name] = (offset, table.nbytes // len(table))
            offset += rounded(table.nbytes)
        self._calls = calls
        self._filled.clear()

    def stream_in(self, k: int, name: str, array: Array) -> None:
        """Queue the upload of an input of call `k`. Each call has its own staging place and waits for no other one."""
        placed = self._as_placed(name, array)
        slot = rounded(self.places[name].nbytes)
        memory = self.streamed.setdefault(name, Memory(self.device, self.owner))
        memory.reserve(slot * self._calls)
        if (name, k) in self._filled:  # the same call again
            self.device.cuda.synchronize(self.device.stream)
        self._filled.add((name, k))
        memory.upload(slot * k, placed, self.address(name))

    def launch(self, k: int | None = None) -> None:
        """Queue one call: copy row `k` of every table to its input, then run the engine. None: there are no tables."""
        cuda, stream = self.device.cuda, self.device.stream
        if k is not None:
            for name, (offset, nbytes) in self._rows.items():
                cuda.copy(self.address(name), self.tables.address + offset + k * nbytes, nbytes, stream)
        if self._epoch != self.device.epoch or self.feeds != self._graph_feeds:
            self._reset()
        elif not self._graph and self._capturable:
            self._capture()
        if self._graph:
            cuda.launch(self._graph, stream)
        else:
            self._enqueue()

    @property
    def replays(self) -> bool:
        """Whether the next launch is a launch of the graph."""
        return bool(self._graph)

    def _reset(self) -> None:
        """Bind the scratch memory where it is now, and drop the graph. The next launch captures another."""
        self._drop_graph()
        self.context.scratch(*self.device.arena(self._scratch))
        self._epoch, self._graph_feeds = self.device.epoch, self.feeds

    def _capture(self) -> None:
        """Capture the graph of a launch, or warn why there is none."""
        if not self.context.capturable(self.device.stream):
            return self._stay_without_graph("TensorRT says that this stream cannot be captured")
        try:
            self._graph = self.device.capture(self._enqueue)
        except LostContextError:
            raise
        except BackendError as error:
            self._stay_without_graph(str(error))

    def _stay_without_graph(self, reason: str) -> None:
        self._capturable = False
        log.warning(
            "%s: no CUDA graph, so every call is launched kernel by kernel, which is slower: %s", self.owner, reason
        )

    def _enqueue(self) -> None:
        """Queue the engine, then the copies of carried outputs and to other contexts."""
        self.context.enqueue(self.device.stream)
        for output, name in self._carry.items():
            self.device.cuda.copy(
                self.address(name), self.address(output), self.places[name].nbytes, self.device.stream
            )
        for feed in self.feeds:
            self.device.cuda.copy(feed.target, feed.source, feed.nbytes, self.device.stream)

    def start_fetch(self, names: tuple[str, ...]) -> None:
        """Queue the download of outputs. After `device.wait(context.done)` they are in staging memory."""
        for name in names:
            place = self.places[name]
            staged = self.tensors.staging[place.offset : place.offset + place.nbytes]
            self.device.cuda.download(staged, self.address(name), self.device.stream)
        self.device.cuda.record(self.done, self.device.stream)

    def fetched(self, name: str) -> Array:
        """A copy of a downloaded output, in the caller's dtype. It belongs to the caller."""
        place = self.places[name]
        staged = self.tensors.staging[place.offset : place.offset + place.nbytes]
        return staged.view(place.dtype).reshape(place.shape).astype(place.dtype_of_caller)

    def _drop_graph(self) -> None:
        if self._graph:
            self.device.cuda.drop(self._graph)
        self._graph = 0

    def close(self) -> None:
        """Free everything, TensorRT's context too: a reference to a closed object must not keep its memory."""
        if self.closed:
            return
        self.closed = True
        self.device.cuda.synchronize(self.device.stream)
        self._drop_graph()
        del self.context
        for memory in (self.tensors, self.tables, *self.streamed.values()):
            memory.free()
        for event in (self.uploaded, self.done):
            if event:  # 0 if making it failed
                self.device.cuda.drop_event(event)


def _check_known(owner: str, tensor: str, known: set[str]) -> None:
    if tensor not in known:
        raise UsageError(f"{owner}: there is no {tensor} to give on; there is {', '.join(sorted(known))}")
