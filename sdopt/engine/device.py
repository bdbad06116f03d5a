"""What all engines on one GPU share: a stream, an arena of scratch memory, and the account of who holds what.

Everything runs on the one stream, in the order in which it is queued. So one arena, as large as the hungriest call
needs, serves all engines and threads in turn, and two threads need a lock only while they queue.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import RLock

from sdopt.engine.cuda import Cuda, LostContextError, OutOfMemoryError, bytes_text, open_cuda

SCRATCH = "scratch"
GRANULE = 256  # bytes that every address is a multiple of, as TensorRT asks


class Device:
    """One GPU, with the memory that its engines hold by name."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.stream = cuda.stream()
        self.epoch = 0  # counts the arena's moves: what was prepared for an older one is prepared again
        self.held: dict[str, int] = {}
        self._arena = (0, 0)
        self._lock = RLock()
        self._lost: LostContextError | None = None

    @contextmanager
    def queueing(self) -> Generator[None]:
        """Around all that touches the GPU: one thread at a time, and never again once the context is lost."""
        with self._lock:
            if self._lost is not None:
                raise LostContextError(str(self._lost))
            try:
                self.cuda.use()
                yield
            except LostContextError as error:
                self._lost = error
                raise

    def wait(self, event: int) -> None:
        """Let this thread sleep until the GPU has come to `event`; others may queue meanwhile."""
        try:
            self.cuda.wait(event)
        except LostContextError as error:
            self._lost = error
            raise

    def allocate(self, owner: str, nbytes: int) -> int:
        """The address of `nbytes` for `owner`.

        Raises: OutOfMemoryError with what every engine holds; nothing is lost by it.
        """
        nbytes = rounded(nbytes)
        try:
            address = self.cuda.malloc(nbytes)
        except OutOfMemoryError as error:
            raise self.full(owner, nbytes) from error
        self.account(owner, nbytes)
        return address

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
        self.epoch += 1
        if address:
            self.free(SCRATCH, address, nbytes)

    def full(self, owner: str, nbytes: int) -> OutOfMemoryError:
        """What to say when `owner` cannot have `nbytes`."""
        free, total = self.cuda.memory()
        held = ", ".join(f"{name} {bytes_text(size)}" for name, size in sorted(self.held.items())) or "nothing"
        return OutOfMemoryError(
            f"{owner}: the GPU's memory is full: {bytes_text(nbytes)} asked, {bytes_text(free)} of "
            f"{bytes_text(total)} free; held here: {held}. Smaller pictures or fewer at once need less, "
            '`pipe.release("vae_encoder")` and the like free an engine, and then it can be tried again.'
        )


_devices: dict[int, Device] = {}


def shared_device(index: int = 0) -> Device:
    """The device of this process for GPU `index`.

    Raises: BackendError as `open_cuda` does.
    """
    if index not in _devices:
        _devices[index] = Device(open_cuda(index))
    return _devices[index]


def rounded(nbytes: int) -> int:
    """`nbytes`, up to a multiple of what addresses are aligned to."""
    return -(-nbytes // GRANULE) * GRANULE
