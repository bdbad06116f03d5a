"""Ctrl-C and SIGTERM end a command alike: everything that it has begun is removed, and one line says what happened.

Both become an exception in the main thread. A library that is interrupted in the middle of its import may turn that
into an error of its own, so `Arrived` remembers the signal, and an error that follows it is no fault of anything else.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Ended(KeyboardInterrupt):
    """SIGTERM, in place of the end of the process: what Ctrl-C cleans up, this does too."""


class Arrived:
    """The first signal that arrived; 0 before."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals. Raises: KeyboardInterrupt; not for another SIGTERM while the first one ends."""
        is_first, self.number = not self.number, self.number or number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if is_first:
            raise Ended

    def line(self) -> str:
        """What to print."""
        return f"sdopt: {WORDS[signal.Signals(self.number or signal.SIGINT)]}"

    def code(self) -> int:
        """The exit code, as shells count it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def caught() -> Generator[Arrived]:
    """While the block runs, both signals raise. One that this process was started to ignore stays ignored."""
    arrived, before = Arrived(), dict[int, Any]()
    if threading.current_thread() is threading.main_thread():
        for number in WORDS:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = handler
                signal.signal(number, arrived)
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
