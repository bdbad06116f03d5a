"""A lane: one execution context for one set of shapes, its addresses on the GPU, its staging memory and its graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from sdopt.bundle.specs import Array, TensorSpec
from sdopt.engine.cuda import LostContextError
from sdopt.engine.device import Device, rounded
from sdopt.engine.trt_api import Context
from sdopt.errors import BackendError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where one tensor is: `offset` into the lane's memory, on the GPU and in its staging copy alike."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    dtype_of_caller: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Feed:
    """A copy from an output to the input of another lane: two addresses on the GPU."""

    source: int
    target: int
    nbytes: int


class Memory:
    """Bytes on the GPU with as many page-locked ones beside them; they grow when asked for more, and never shrink."""

    def __init__(self, device: Device, owner: str) -> None:
        self.device, self.owner = device, owner
        self.address, self.nbytes = 0, 0
        self.staging: Array = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Hold at least `nbytes`; their content is lost if they move."""
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
        """Give the memory back; nothing may be queued that uses it."""
        if self.address:
            self.device.free(self.owner, self.address, self.nbytes)
            self.device.cuda.unpin(self.staging)
        self.address, self.nbytes = 0, 0

    def upload(self, offset: int, array: Array, target: int | None = None) -> None:
        """Queue the upload of `array` from its staging place; nobody may write there until the GPU has read it."""
        staged = self.staging[offset : offset + array.nbytes]
        placed: Array = cast(Any, staged).view(array.dtype).reshape(array.shape)
        np.copyto(placed, array)
        self.device.cuda.upload(self.address + offset if target is None else target, staged, self.device.stream)


class Lane:
    """A context that is ready for one set of shapes. Its methods are called with the device's lock held.

    The first launch runs the engine plainly, since TensorRT does some of its work late. The second one captures a
    graph, which it and all further ones launch. So a component that is called once runs once, and captures nothing. The
    scratch memory may move when another engine needs more: the next launches begin anew.
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
        shapes = {n: (shape, dtype, spec.dtype) for n, (spec, shape, dtype) in inputs.items()}
        shapes |= {n: (context.shape(n), dtype, spec.dtype) for n, (spec, dtype) in outputs.items()}
        self.inputs, self.places, total = tuple(inputs), dict[str, Place](), 0
        for name, (shape, dtype, asked) in shapes.items():
            if any(length < 0 for length in shape):
                raise BackendError(f"{owner}: the engine cannot tell the shape of {name!r} before it runs")
            self.places[name] = Place(total, shape, np.dtype(dtype), asked)
            total += rounded(self.places[name].nbytes)
        self.tensors, self.tables = Memory(device, owner), Memory(device, owner)
        self.streamed: dict[str, Memory] = {}  # of each input that `stream_in` is given, one place for each call
        self._epoch, self._graph = -1, 0
        self._capturable = True  # until it is known that its work cannot become a graph
        self.feeds: tuple[Feed, ...] = ()  # what each launch gives to other lanes
        self._graph_feeds: tuple[Feed, ...] = ()  # those that are part of the graph
        self._rows: dict[str, tuple[int, int]] = {}  # input -> (offset of its table, bytes of a row)
        self._slots = 0
        self._filled: set[tuple[str, int]] = set()  # slots that the GPU may not have read yet
        self.uploaded = self.done = 0
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
        """Zeros in every input, and no tables."""
        for name in self.inputs:
            self.device.cuda.clear(self.address(name), self.places[name].nbytes, self.device.stream)
        self._rows, self._slots = {}, 0

    def put(self, name: str, array: Array) -> None:
        """Queue the upload of an input. Its staging place may be written again after `settle`."""
        self.tensors.upload(self.places[name].offset, self._as_placed(name, array))
        self.device.cuda.record(self.uploaded, self.device.stream)

    def _as_placed(self, name: str, array: Array) -> Array:
        """`array` in the type of its place.

        Raises: UsageError for what is no input, or does not fit: it would lie in the places of others.
        """
        if name not in self.inputs:
            raise UsageError(f"{self.owner}: unknown input {name}; it takes {', '.join(self.inputs)}")
        place = self.places[name]
        if array.shape != place.shape:
            raise UsageError(f"{self.owner} input {name!r}: got {list(array.shape)}; this run has {list(place.shape)}")
        return np.ascontiguousarray(array, place.dtype)

    def feed(self, output: str, to: Lane, name: str) -> None:
        """From now on each launch copies `output` to input `name` of another lane of this device.

        Raises: UsageError for tensors that do not have the same shape and dtype.
        """
        for lane, tensor, names in ((self, output, set(self.places) - set(self.inputs)), (to, name, set(to.inputs))):
            if tensor not in names:
                raise UsageError(f"{lane.owner}: there is no {tensor} to give on; there is {', '.join(sorted(names))}")
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
        """Upload the rows of all calls at once, and make room to stream what `launch` is given in each of them."""
        casts = {n: np.ascontiguousarray(t, self.places[n].dtype) for n, t in tables.items()}
        self.tables.reserve(sum(rounded(t.nbytes) for t in casts.values()))
        offset = 0
        for name, table in casts.items():
            self.tables.upload(offset, table)
            self._rows[name] = (offset, table.nbytes // len(table))
            offset += rounded(table.nbytes)
        self._slots = calls
        self._filled.clear()

    def stream_in(self, k: int, name: str, array: Array) -> None:
        """Queue an input of call `k` from a staging place of its own: nothing waits for the one before."""
        placed = self._as_placed(name, array)
        slot = rounded(self.places[name].nbytes)
        memory = self.streamed.setdefault(name, Memory(self.device, self.owner))
        memory.reserve(slot * self._slots)
        if (name, k) in self._filled:  # the same call again
            self.device.cuda.synchronize(self.device.stream)
        self._filled.add((name, k))
        memory.upload(slot * k, placed, self.address(name))

    def launch(self, k: int | None = None) -> None:
        """Queue one call: row `k` of every table to its input, then the graph. Without `k` there are no tables."""
        cuda, stream = self.device.cuda, self.device.stream
        if k is not None:
            for name, (offset, nbytes) in self._rows.items():
                cuda.copy(self.address(name), self.tables.address + offset + k * nbytes, nbytes, stream)
        if self._epoch != self.device.epoch or self.feeds != self._graph_feeds:
            self._arm()
        elif not self._graph and self._capturable:
            self._capture()
        if self._graph:
            cuda.launch(self._graph, stream)
        else:
            self._work()

    @property
    def replays(self) -> bool:
        """Whether the next launch is that of a graph."""
        return bool(self._graph)

    def _arm(self) -> None:
        """Take the arena where it is now. The launch that does so runs plainly: TensorRT does some work late."""
        self._drop_graph()
        self.context.scratch(*self.device.arena(self._scratch))
        self._epoch, self._graph_feeds = self.device.epoch, self.feeds

    def _capture(self) -> None:
        """Make a graph of a launch, or say why there is none."""
        if not self.context.capturable(self.device.stream):
            return self._stay_without_graph("TensorRT says that this stream cannot be captured")
        try:
            self._graph = self.device.capture(self._work)
        except LostContextError:
            raise
        except BackendError as error:
            self._stay_without_graph(str(error))

    def _stay_without_graph(self, reason: str) -> None:
        self._capturable = False
        log.warning(
            "%s: no CUDA graph, so every call is launched kernel by kernel, which is slower: %s", self.owner, reason
        )

    def _work(self) -> None:
        self.context.enqueue(self.device.stream)
        for output, name in self._carry.items():
            self.device.cuda.copy(
                self.address(name), self.address(output), self.places[name].nbytes, self.device.stream
            )
        for feed in self.feeds:
            self.device.cuda.copy(feed.target, feed.source, feed.nbytes, self.device.stream)

    def start_fetch(self, names: tuple[str, ...]) -> None:
        """Queue the download of outputs; `device.wait(lane.done)` ends when they are in staging memory."""
        for name in names:
            place = self.places[name]
            staged = self.tensors.staging[place.offset : place.offset + place.nbytes]
            self.device.cuda.download(staged, self.address(name), self.device.stream)
        self.device.cuda.record(self.done, self.device.stream)

    def fetched(self, name: str) -> Array:
        """A copy of an output, which belongs to the caller."""
        place = self.places[name]
        staged = self.tensors.staging[place.offset : place.offset + place.nbytes]
        return staged.view(place.dtype).reshape(place.shape).astype(place.dtype_of_caller)

    def _drop_graph(self) -> None:
        if self._graph:
            self.device.cuda.drop(self._graph)
        self._graph = 0

    def close(self) -> None:
        """Free everything, also TensorRT's context: whoever still knows the lane must not keep its memory."""
        if self.closed:
            return
        self.closed = True
        self.device.cuda.synchronize(self.device.stream)
        self._drop_graph()
        del self.context
        for memory in (self.tensors, self.tables, *self.streamed.values()):
            memory.free()
        for event in (self.uploaded, self.done):
            if event:  # 0 where there was none to be had
                self.device.cuda.drop_event(event)
