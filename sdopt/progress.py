"""Progress on stderr: a bar on a terminal, plain lines where the cursor cannot move.

    with bar("denoising", total=20) as shown:
        for step in steps:
            shown.update()
    with busy("decoding"):
        ...

A bar is made of ASCII characters and is never wider than the terminal. It uses no colours.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Any, TextIO

GONE = (OSError, ValueError)  # the terminal was closed: that costs no picture
SECONDS = 10.0  # between two plain lines
# What matters most stands first: a narrow terminal cuts the end off.
FORMAT = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_fmt}"
_shown: list[Bar] = []  # on the terminal now


def stderr() -> TextIO | None:
    """The stream for progress; None in a process without one."""
    stream: Any = sys.stderr
    return getattr(stream, "stream", stream)  # the stream behind one that escapes what is written


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that can write over a line."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except ValueError:  # it was closed
        return False


class Progress:
    """Progress that is not shown; the base of those that are."""

    def __init__(self, label: str, total: int | None = None) -> None:
        self.label, self.total, self.done = label, total, 0

    def update(self, done: int | None = None, *, label: str | None = None, total: int | None = None) -> None:
        """One more part is done, or `done` parts in all. `label` and `total` replace those that were given."""
        self.done = self.done + 1 if done is None else done
        self.label = self.label if label is None else label
        self.total = self.total if total is None else total
        self.show()

    def show(self) -> None:
        """Show how far it is."""

    def clear(self) -> None:
        """Make room for a line of text."""

    def close(self) -> None:
        """Show no more."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Lines(Progress):
    """A line when it begins, one every few seconds, and one when it is done."""

    def __init__(self, label: str, total: int | None, stream: TextIO) -> None:
        super().__init__(label, total)
        self._stream, self._last = stream, -SECONDS
        if total is None:
            self._write(label)

    def show(self) -> None:
        now = time.monotonic()
        is_done = self.total is not None and self.done >= self.total
        if is_done or now - self._last >= SECONDS:
            self._last = now
            self._write(f"{self.label} {self.done}/{self.total}")

    def _write(self, text: str) -> None:
        with suppress(*GONE):
            print(text, file=self._stream, flush=True)


class Bar(Progress):
    """A bar of tqdm."""

    def __init__(self, label: str, total: int | None, stream: TextIO, leave: bool) -> None:
        super().__init__(label, total)
        how: dict[str, Any] = {"leave": leave, "file": stream, "dynamic_ncols": True, "ascii": " #"}
        how["bar_format"] = "{desc} ..." if total is None else FORMAT
        self._bar = _tqdm(stream)(desc=label, total=total, **how)
        _shown.append(self)

    def show(self) -> None:
        with suppress(*GONE):
            self._show(self._bar)

    def _show(self, bar: Any) -> None:
        if (bar.desc, bar.total) != (self.label, self.total):
            bar.set_description_str(self.label, refresh=False)
            bar.total = self.total
            bar.n = self.done
            bar.refresh()
        else:
            bar.update(self.done - bar.n)

    def clear(self) -> None:
        with suppress(*GONE):
            self._bar.clear()

    def close(self) -> None:
        with suppress(*GONE):
            self._bar.close()
        if self in _shown:
            _shown.remove(self)


def _tqdm(stream: TextIO) -> Any:
    """The class of a bar on this stream."""
    if _is_notebook(stream):
        from tqdm.auto import tqdm  # late: only a notebook has one

        return tqdm
    return _terminal_tqdm()


@cache
def _terminal_tqdm() -> Any:
    from threading import RLock

    from tqdm import tqdm  # late: most calls show no bar

    class Terminal(tqdm):  # pyright: ignore[reportMissingTypeArgument, reportUntypedBaseClass]
        monitor_interval = 0  # no thread of its own, which a forked child would lack

        @staticmethod
        def status_printer(file: Any) -> Any:
            """Writes over the line. The terminal erases what was there, so that no blanks reach beyond its edge."""

            def write(text: str) -> None:
                with suppress(*GONE):
                    file.write(f"\r\x1b[K{text}")
                    file.flush()

            return write

    Terminal.set_lock(RLock())  # tqdm's own is one of processes
    return tqdm if os.name == "nt" else Terminal


def _is_notebook(stream: TextIO) -> bool:
    return type(stream).__module__.startswith("ipykernel")


def clear() -> None:
    """Make room for a line of text on the terminal. Bars come back when they are updated."""
    for shown in _shown:
        shown.clear()


def bar(label: str, total: int | None = None, *, show: bool | None = True, leave: bool = False) -> Progress:
    """Progress with a label, to be updated.

    `show`: False never shows it; None shows it on a terminal. True shows it anywhere, as lines where there is no
    terminal. `leave` keeps the finished bar on a terminal.
    """
    stream = stderr()
    if stream is None or show is False:
        return Progress(label, total)
    if is_terminal(stream) or _is_notebook(stream):
        return Bar(label, total, stream, leave)
    return Lines(label, total, stream) if show else Progress(label, total)


def busy(label: str, *, show: bool | None = True) -> Progress:
    """A label while something without steps is done. A terminal removes it afterwards."""
    return bar(label, show=show)
