"""What libraries in C++ and Rust write to stderr by themselves is escaped too.

They write to file descriptor 2, past Python's `sys.stderr`. So in a process of the command line that descriptor is a
pipe, and a small child process passes on what comes out of it, escaped. A thread would not do: a library may write
while it holds Python's lock, or write and then end the process. Python's own stderr keeps the terminal.
"""

from __future__ import annotations

import codecs
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import NoReturn

from sdopt.cli.terminal import escape, settle

STDERR = 2
LAST_WORDS_SECONDS = 1.0  # at the end, for the child to pass on what it has


@contextmanager
def native_escaped() -> Generator[None]:
    """While the block runs, what is written to file descriptor 2 is escaped. It is not where no process can be forked.

    To be used at the start of a process, when it has one thread.
    """
    if not hasattr(os, "fork") or sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        yield
        return
    try:
        terminal = os.dup(STDERR)
        stream = os.fdopen(os.dup(terminal), "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)
        reading, writing = os.pipe()
        child = os.fork()
    except (OSError, AttributeError):  # a process without stderr, or one that may not have another process
        yield
        return
    if child == 0:
        os.close(writing)
        _pass_on(reading, terminal)
    os.close(reading)
    os.dup2(writing, STDERR)
    os.close(writing)
    before, sys.stderr = sys.stderr, stream
    try:
        yield
    finally:
        settle(stream)
        sys.stderr = before
        os.dup2(terminal, STDERR)  # the last end of the pipe, unless a process that this one started has it
        os.close(terminal)
        _wait(child)


def _pass_on(reading: int, terminal: int) -> NoReturn:
    """The child: pass on all that comes, until the process and all that it started have ended."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # the other process decides when it ends
            signal.signal(number, signal.SIG_IGN)
        for descriptor in {0, 1, STDERR} - {reading, terminal}:  # a closed number is given to what is opened next
            with suppress(OSError):
                os.close(descriptor)
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        while content := os.read(reading, 1 << 16):
            _write(terminal, escape(decoder.decode(content)))
        _write(terminal, escape(decoder.decode(b"", final=True)))
    finally:
        os._exit(0)


def _write(descriptor: int, text: str) -> None:
    content = text.encode("utf-8", "backslashreplace")
    while content:
        content = content[os.write(descriptor, content) :]


def _wait(child: int) -> None:
    end = time.monotonic() + LAST_WORDS_SECONDS
    try:
        while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < end:
            time.sleep(0.001)
    except ChildProcessError:  # somebody else has waited for it
        pass
