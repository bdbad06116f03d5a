"""What a command prints. Control characters in texts of bundles, PNGs and prompts are printed escaped.

`escaped()` puts a stream in front of stdout and of stderr that escapes all that is written: results, errors, warnings,
tracebacks, logs. Progress bars move the cursor, so `sdopt.progress` takes the stream behind it.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from sdopt import progress

# C0 but tab and newline, DEL and C1; marks that change the direction of text; line separators; halves of UTF-16 and
# bytes that are not UTF-8, which Python holds as such halves.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def escape(text: str) -> str:
    """The text with its control characters as Python writes them: ESC is shown as `\\x1b`."""
    return CONTROL.sub(lambda match: _shown(ord(match[0])), text)


def one_line(text: str) -> str:
    """The same for a text that is one line of several: its newlines are escaped too."""
    return escape(text).replace("\n", "\\n")


def _shown(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Escaped:
    """A text stream that escapes what is written, also characters that the terminal's encoding does not have."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        shown = escape(text)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Remarks(Escaped):
    """The same for stderr. What cannot be written there is lost: it costs no picture and no other line."""

    def write(self, text: str) -> int:
        with suppress(*progress.GONE):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(*progress.GONE):
            self.stream.flush()


class Nowhere(io.TextIOBase):
    """In place of a stream that a process does not have: `print` would take stdout for a stderr that is None."""

    def write(self, text: str, /) -> int:
        return len(text)


def fill_closed() -> None:
    """Open the null device under each number of a standard stream that is closed.

    Else the next file, perhaps a picture, would get the number, and what libraries write to stderr would be in it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


def settle(stream: TextIO | None) -> None:
    """Write what is in a stream's buffer. If that fails it goes nowhere, and Python does not try it again."""
    if stream is None:
        return
    try:
        stream.flush()
    except progress.GONE:
        with suppress(*progress.GONE):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@contextmanager
def escaped() -> Generator[None]:
    """While the block runs, stdout and stderr escape what is written. Streams that were closed take it to nowhere."""
    before = sys.stdout, sys.stderr
    stdout, stderr = (cast(TextIO, Nowhere()) if stream is None else stream for stream in before)
    sys.stdout, sys.stderr = cast(TextIO, Escaped(stdout)), cast(TextIO, Remarks(stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Handler(logging.Handler):
    """Prints log lines on stderr, whichever stream that is now, as `worded` puts them."""

    def __init__(self, worded: Callable[[str], str]) -> None:
        super().__init__()
        self.worded = worded

    def emit(self, record: logging.LogRecord) -> None:
        say(self.worded(self.format(record)), always=True)


class _Level:
    """How much is printed beside results and errors; set by `messages`."""

    quiet = False


@contextmanager
def messages(*, quiet: bool = False, verbose: bool = False, worded: Callable[[str], str] = str) -> Generator[None]:
    """While the block runs, what the library logs, and Python's warnings, are printed as far as the user wants it.

    `worded` puts a line in the words of the command line.
    """
    logger, handler = logging.getLogger("sdopt"), _Handler(worded)
    form = "sdopt: %(message)s (%(name)s, %(relativeCreated)d ms)" if verbose else "sdopt: %(message)s"
    handler.setFormatter(logging.Formatter(form))
    before, warn = logger.level, warnings.showwarning
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    _Level.quiet = quiet
    warnings.showwarning = _log_warning
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        _Level.quiet = False
        warnings.showwarning = warn


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    logging.getLogger("sdopt.cli").warning("%s", message)


def say(line: str, always: bool = False) -> None:
    """A line on stderr that tells how far the work is. `--quiet` leaves it out."""
    if always or not _Level.quiet:
        progress.clear()
        print(line, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """A remark on stderr. `--quiet` leaves it out."""
    logging.getLogger("sdopt.cli").warning("%s", text)


def bar(label: str, total: int | None = None) -> progress.Progress:
    """Progress with a label, on a terminal. `--quiet` leaves it out."""
    return progress.bar(one_line(label), total, show=False if _Level.quiet else None)


def busy(label: str) -> progress.Progress:
    """A label on a terminal while something without steps is done. It is removed afterwards."""
    return bar(label)


class Phases:
    """A bar of phases that follow each other: (what is done, how many parts of it are done, of how many)."""

    def __init__(self) -> None:
        self._bar: progress.Progress | None = None

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, phase: str, done: int, of: int) -> None:
        if self._bar is None:
            self._bar = bar(phase, of)
        self._bar.update(done, label=one_line(phase), total=max(of, done))
