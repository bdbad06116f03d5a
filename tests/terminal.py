"""A terminal for tests: a process runs on a real one (a pty), and what it shows in the end is read from its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Sequence

from tests.conftest import ROOT


def on_a_terminal(
    command: Sequence[object], columns: int, *, then: int = 0, rows: int = 24, **environment: str
) -> tuple[str, int]:
    """(all that a Python process wrote on a terminal of this width, its exit code).

    `then` is the width that the terminal gets as soon as the process writes.
    """
    words = [sys.executable, *map(str, command)]
    ready, go = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(ROOT)
            os.read(ready, 1)
            os.execve(words[0], words, {**os.environ, "TERM": "xterm", **environment})
        finally:
            os._exit(1)
    resize(terminal, rows, columns)
    os.write(go, b"1")
    written, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the process ended
            break
        if not piece:
            break
        written += piece
        if then:
            resize(terminal, rows, then)
            then = 0
    for handle in (terminal, ready, go):
        os.close(handle)
    return written.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def screen(written: str, columns: int) -> list[str]:
    """The lines of a terminal that has shown this. A line that is too long goes on in the next one.

    Raises: AssertionError for a control sequence that no simple terminal knows.
    """
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[K|[\r\n]|[^\r\n]", written):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
        elif piece == "\x1b[K":
            lines[row] = lines[row][:column]
        else:
            assert piece.isprintable(), repr(piece)
            if columns and column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]
