"""What the fork and the end of a process mean for engines.

A library's session has threads of its own, which a forked child does not have: a call would wait for them for ever,
and so would the end of the session. So the child forgets every engine of its parent, and nothing there is freed.
At the end of a process Python stops daemon threads wherever they are. Inside a library that aborts the process, so the
process first waits for the calls that are running, and lets no further one begin.
"""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Condition, Event, current_thread
from typing import Any, Protocol
from weakref import WeakSet

from sdopt.errors import BackendError, UsageError


class Inherited(Protocol):
    """An object that a forked child must not use as its parent left it."""

    def forget_parent(self) -> None:
        """Called in the child, before anything else runs there."""
        ...


class _Calls:
    """The calls of engine libraries that are running now."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._running: dict[int, Callable[[], None]] = {}
        self._count = 0
        self._ending = False

    @contextmanager
    def one(self, stop: Callable[[], None]) -> Generator[None]:
        """Count one call; `stop` makes it end early. A daemon thread stays here once the process ends."""
        with self._changed:
            self._count += 1
            number, ends_here = self._count, self._ends_here
            if not ends_here:
                self._running[number] = stop
        if ends_here:
            _stay()
        try:
            yield
        finally:
            with self._changed:
                del self._running[number]
                self._changed.notify_all()
                ends_here = self._ends_here
            if ends_here:
                _stay()

    @property
    def _ends_here(self) -> bool:
        return self._ending and current_thread().daemon

    def end(self) -> None:
        """Wait until no call is running, and let daemon threads begin no other."""
        with self._changed:
            self._ending = True
            for stop in list(self._running.values()):
                stop()
            while self._running:
                self._changed.wait()


_inherited: WeakSet[Inherited] = WeakSet()
_calls = _Calls()


def _stay() -> None:
    Event().wait()


def _goes_on() -> None:
    """The `stop` of a call that cannot end early."""


@contextmanager
def library_call(stop: Callable[[], None] = _goes_on) -> Generator[None]:
    """Every call of an engine library that takes long is inside; `stop`, from another thread, makes it end early."""
    with _calls.one(stop):
        yield


def inherit(owner: Inherited) -> None:
    """Call `owner.forget_parent()` in every child that this process forks, for as long as the owner lives."""
    _inherited.add(owner)


class Native:
    """What an engine library made for this process, until it is closed."""

    def __init__(self, component: str, value: Any) -> None:
        self._component, self._value, self._is_parents = component, value, False
        inherit(self)

    def get(self) -> Any:
        """The library's object.

        Raises: UsageError if it is closed; BackendError in a forked child of the process that made it.
        """
        value = self._value
        if value is not None:
            return value
        if self._is_parents:
            raise BackendError(
                f"{self._component}: this process was forked from the one that opened this engine, and its threads are "
                "not here. Call open_engine in this process; a Pipeline does so by itself"
            )
        raise UsageError(f"{self._component}: this engine is closed; open it again with open_engine")

    def close(self) -> None:
        self._value = None

    def __reduce__(self) -> tuple[Any, ...]:
        raise UsageError(
            f"{self._component}: an open engine belongs to its process; send its Pipeline, or open it there"
        )

    def forget_parent(self) -> None:
        if self._value is not None:
            _never_free(self._value)
            self._value, self._is_parents = None, True


def _never_free(value: Any) -> None:
    """One reference that nobody gives back, so that even the end of Python does not free the object."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _in_child() -> None:
    global _calls
    _calls = _Calls()  # a thread of the parent may have been in a call, or have held the lock
    for owner in list(_inherited):
        owner.forget_parent()


def _at_end() -> None:
    _calls.end()


atexit.register(_at_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
