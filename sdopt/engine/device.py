"""What all engines on one GPU share: a stream, an arena of scratch memory, and a list of who holds how much memory.

Everything runs on one stream, in the order in which it is queued. So one arena, as large as the largest call needs,
serves all engines and threads in turn. Two threads need a lock only while they queue.

An engine that was never closed is closed when Python collects it. That may happen at any moment, even between two CUDA
calls of the same thread. So `discard` frees at once only if nobody is queueing. Otherwise the next thread that queues
frees it.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from threading import Lock, RLock
from typing import Protocol, TypeVar
from weakref import WeakSet

from sdopt.bundle.disk import bytes_text
from sdopt.engine.cuda import Cuda, open_cuda
from sdopt.engine.cuda_errors import LostContextError, OutOfMemoryError

T = TypeVar("T")
SCRATCH = "scratch"
GRANULE = 256  # bytes; TensorRT needs addresses that are multiples of it


class Holder(Protocol):
    """An object that holds GPU memory for one engine. Its methods need the device's lock."""

    def trim(self) -> None:
        """Free what is only kept for a later call."""
        ...

    def close(self) -> None:
        """Free everything. A second call does nothing."""
        ...


class Device:
    """One GPU, and how much of its memory each engine holds."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        with cuda.current():
            self.stream = cuda.stream()
        self.epoch = 0  # counts the moves of the arena; contexts of an older epoch bind it again
        self.held: dict[str, int] = {}
        self._holders: WeakSet[Holder] = WeakSet()
        self._discarded: deque[Holder] = deque()
        self._arena = (0, 0)
        self._lock, self._depth = RLock(), 0
        self._lost: LostContextError | None = None

    @contextmanager
    def queueing(self) -> Generator[None]:
        """Hold the lock of the GPU: every use of it is inside.

        Raises: LostContextError if the context was lost before.
        """
        with self._lock:
            if self._lost is not None:
                raise LostContextError(str(self._lost))
            self._depth += 1
            try:
                with self.cuda.current():
                    if self._depth == 1:
                        self._free_discarded()
                    yield
            except LostContextError as error:
                self._lost = error
                raise
            finally:
                self._depth -= 1

    def wait(self, event: int) -> None:
        """Let this thread sleep until the GPU has reached `event`. Other threads may queue meanwhile."""
        if self._lost is not None:
            raise LostContextError(str(self._lost))
        try:
            self.cuda.wait(event)
        except LostContextError as error:
            self._lost = error
            raise

    def abandon(self, reason: str) -> None:
        """Refuse all further use of this GPU in this process. Nothing of it is freed."""
        self._lock, self._depth = RLock(), 0  # at the fork, a thread of the parent may have held the lock
        self._lost = LostContextError(reason)

    def capture(self, work: Callable[[], None]) -> int:
        """A graph of what `work` queues. Python collects no garbage meanwhile: a capture must not free memory."""
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return self.cuda.capture(work, self.stream)
        finally:
            if was_enabled:
                gc.enable()

    # ---- memory

    def allocate(self, owner: str, nbytes: int) -> int:
        """The address of `nbytes` for `owner`. If the GPU is full, idle memory of all engines is freed first.

        Raises: OutOfMemoryError with what every engine holds. Nothing is lost by it.
        """
        nbytes = rounded(nbytes)
        try:
            address = self.with_room(lambda: self.cuda.malloc(nbytes))
        except OutOfMemoryError as error:
            raise self.full(owner, nbytes) from error
        self.account(owner, nbytes)
        return address

    def with_room(self, take: Callable[[], T]) -> T:
        """What `take` returns. If it finds no memory, all idle memory is freed and `take` is called once more.

        Raises: OutOfMemoryError from the second call.
        """
        try:
            return take()
        except OutOfMemoryError:
            self.trim()
            return take()

    def trim(self) -> None:
        """Free what engines only keep for later calls, and the arena. Needs the lock."""
        for holder in list(self._holders):
            holder.trim()
        self.cuda.synchronize(self.stream)
        self._drop_arena()

    def free(self, owner: str, address: int, nbytes: int) -> None:
        self.cuda.free(address)
        self.account(owner, -rounded(nbytes))

    def account(self, owner: str, nbytes: int) -> None:
        """Add `nbytes`, which may be negative, to what `owner` holds."""
        self.held[owner] = self.held.get(owner, 0) + nbytes
        if self.held[owner] <= 0:
            del self.held[owner]

    def arena(self, nbytes: int) -> tuple[int, int]:
        """(address, bytes) of at least `nbytes` of scratch memory. If it has to grow, its address changes."""
        if nbytes > self._arena[1] or not self._arena[0]:
            nbytes = max(rounded(nbytes), GRANULE)
            self.cuda.synchronize(self.stream)
            self._drop_arena()
            self._arena = (self.allocate(SCRATCH, nbytes), nbytes)
        return self._arena

    def _drop_arena(self) -> None:
        address, nbytes = self._arena
        self._arena = (0, 0)
        if address:
            self.epoch += 1
            self.free(SCRATCH, address, nbytes)

    # ---- engines

    def register(self, holder: Holder) -> None:
        """Note that `holder` holds memory, until `forget`."""
        self._holders.add(holder)

    def forget(self, holder: Holder) -> None:
        """The holder has freed its memory. With the last holder the arena is freed too. Needs the lock."""
        self._holders.discard(holder)
        if not self._holders:
            self._drop_arena()

    def discard(self, holder: Holder) -> None:
        """Close the holder of an engine that was never closed: now, or before the next thread queues."""
        self._discarded.append(holder)
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._depth and self._lost is None:
                with suppress(LostContextError), self.queueing():
                    pass  # frees what was discarded
        finally:
            self._lock.release()

    def _free_discarded(self) -> None:
        while self._discarded:
            self._discarded.popleft().close()

    def full(self, owner: str, nbytes: int, reason: str = "") -> OutOfMemoryError:
        """The error when `owner` cannot have `nbytes`. `reason` is the library's own text."""
        free, total = self.cuda.memory()
        detail = f" TensorRT says: {reason}" if reason else ""
        held = ", ".join(f"{name} {bytes_text(size)}" for name, size in sorted(self.held.items())) or "nothing"
        return OutOfMemoryError(
            f"{owner}: the GPU's memory is full: {bytes_text(nbytes)} asked, {bytes_text(free)} of "
            f"{bytes_text(total)} free; held here: {held}. Smaller pictures or fewer at once need less, "
            f'`pipe.release("vae_encoder")` and the like free an engine, and then it can be tried again.{detail}'
        )


_devices: dict[int, Device] = {}
_opening = Lock()


def shared_device(index: int = 0) -> Device:
    """The device of this process for GPU `index`.

    Raises: BackendError as `open_cuda` does.
    """
    with _opening:
        if index not in _devices:
            _devices[index] = Device(open_cuda(index))
        return _devices[index]


def _forked() -> None:
    """CUDA does not survive a fork: in the child every call fails, and the memory belongs to the parent."""
    global _opening
    _opening = Lock()
    for device in _devices.values():
        device.abandon(
            "this process was forked from one that used the GPU already, and CUDA does not work in such a one. Start "
            'processes with multiprocessing.get_context("spawn"), or load the pipeline after the fork'
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def rounded(nbytes: int) -> int:
    """`nbytes`, rounded up to a multiple of GRANULE."""
    return -(-nbytes // GRANULE) * GRANULE
