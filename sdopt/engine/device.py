"""What all engines on one GPU share: a stream, an arena of scratch memory, and the account of who holds what.

Everything runs on the one stream, in the order in which it is queued. So one arena, as large as the largest call
needs, serves all engines and threads in turn, and two threads need a lock only while they queue.

An engine that nobody closes is closed when Python drops it. Python may do that at any moment, also between two CUDA
calls of the same thread. So `discard` frees at once only where this thread is not queueing, and else leaves it to the
next thread that begins to.
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

from sdopt.engine.cuda import Cuda, LostContextError, OutOfMemoryError, bytes_text, open_cuda

T = TypeVar("T")
SCRATCH = "scratch"
GRANULE = 256  # bytes that every address is a multiple of, as TensorRT asks


class Holder(Protocol):
    """What holds memory of a GPU for one engine. Its methods are called with the device's lock held."""

    def trim(self) -> None:
        """Give back what is only kept because it may be needed again."""
        ...

    def close(self) -> None:
        """Give everything back; again is harmless."""
        ...


class Device:
    """One GPU, with the memory that its engines hold by name."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        with cuda.current():
            self.stream = cuda.stream()
        self.epoch = 0  # counts the arena's moves: what was prepared for an older one is prepared again
        self.held: dict[str, int] = {}
        self._holders: WeakSet[Holder] = WeakSet()
        self._discarded: deque[Holder] = deque()
        self._arena = (0, 0)
        self._lock, self._depth = RLock(), 0
        self._lost: LostContextError | None = None

    @contextmanager
    def queueing(self) -> Generator[None]:
        """Around all that touches the GPU: one thread at a time, and never again once the context is lost."""
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
        """Let this thread sleep until the GPU has come to `event`; others may queue meanwhile."""
        if self._lost is not None:
            raise LostContextError(str(self._lost))
        try:
            self.cuda.wait(event)
        except LostContextError as error:
            self._lost = error
            raise

    def abandon(self, reason: str) -> None:
        """Nothing of this GPU may be used again by this process, nor be freed."""
        self._lock, self._depth = RLock(), 0  # another thread of the process that was forked may have held it
        self._lost = LostContextError(reason)

    def capture(self, work: Callable[[], None]) -> int:
        """A graph of what `work` queues. Python's collector rests meanwhile: what it frees may not be freed there."""
        collects = gc.isenabled()
        gc.disable()
        try:
            return self.cuda.capture(work, self.stream)
        finally:
            if collects:
                gc.enable()

    # ---- memory

    def allocate(self, owner: str, nbytes: int) -> int:
        """The address of `nbytes` for `owner`. Where the GPU is full, what engines only keep in reserve goes first.

        Raises: OutOfMemoryError with what every engine holds; nothing is lost by it.
        """
        nbytes = rounded(nbytes)
        try:
            address = self.with_room(lambda: self.cuda.malloc(nbytes))
        except OutOfMemoryError as error:
            raise self.full(owner, nbytes) from error
        self.account(owner, nbytes)
        return address

    def with_room(self, take: Callable[[], T]) -> T:
        """What `take` returns; where it finds no memory it is tried again, once all that lies idle is given back.

        Raises: OutOfMemoryError, as `take` does.
        """
        try:
            return take()
        except OutOfMemoryError:
            self.trim()
            return take()

    def trim(self) -> None:
        """Give back what engines keep for shapes that may come again, and the arena; with the lock held."""
        for holder in list(self._holders):
            holder.trim()
        self.cuda.synchronize(self.stream)
        self._drop_arena()

    def free(self, owner: str, address: int, nbytes: int) -> None:
        self.cuda.free(address)
        self.account(owner, -rounded(nbytes))

    def account(self, owner: str, nbytes: int) -> None:
        """Note that `owner` holds so many bytes more."""
        self.held[owner] = self.held.get(owner, 0) + nbytes
        if self.held[owner] <= 0:
            del self.held[owner]

    def arena(self, nbytes: int) -> tuple[int, int]:
        """(address, bytes) of scratch memory of at least `nbytes`; a larger one than before has another address."""
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
        """Note who holds memory; `forget` is its end."""
        self._holders.add(holder)

    def forget(self, holder: Holder) -> None:
        """The holder has given back what it held. The last one takes the arena along; with the lock held."""
        self._holders.discard(holder)
        if not self._holders:
            self._drop_arena()

    def discard(self, holder: Holder) -> None:
        """Close the holder of an engine that was dropped without being closed, now or as soon as it may be done."""
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
        """What to say when `owner` cannot have `nbytes`; `reason`: the library's own words."""
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
    """CUDA does not survive a fork: in the child its every call fails, and its memory is the parent's."""
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
    """`nbytes`, up to a multiple of what addresses are aligned to."""
    return -(-nbytes // GRANULE) * GRANULE
