"""Programs that make pictures in processes of their own: one JSON object a line, asked on stdin, answered on stdout.

    {"do": "prepare", ...}                 convert the checkpoint into `cache`, once; not timed
    {"do": "load", ...}                    {"parts": {"import": s, "load": s}, "precision", "backend", "note",
                                            "versions": {name: version}, "takes_latents": true,
                                            "half_level": 0.5 / 255 for a picture that has 8 bits, else 0}
    {"do": "run", "picture": "FILE.npy"}   {"seconds": s}; the picture [batch, height, width, 3] in 0..1 into FILE.npy
    {"do": "memory"}                       {"peak_rss_bytes": n}

prepare and load carry `case` (the fields of `cases.Case`), `checkpoint`, `bundle`, `cache`, `latents` (a .npy file of
the standard normal latents), `threads` and `device`. A fault is answered with {"error": text}. Both ends are here; no
more than Python is needed, so an adapter runs in any environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sdopt.errors import BackendError

Message = dict[str, Any]
ENDING_SECONDS = 10


def serve(handlers: Mapping[str, Callable[[Message], Message]]) -> None:
    """Answer until stdin ends. What the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        message: Message = json.loads(line)
        try:
            answer = handlers[message["do"]](message)
        except Exception as error:  # whatever a library raises is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def memory(message: Message) -> Message:
    """The handler of `memory`, for all of them."""
    return {"peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes() -> int | None:
    """The most memory that this process had resident.

    Linux's VmHWM, not getrusage's ru_maxrss: that one starts with what the parent process had when it forked.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


class Program:
    """A program that serves, started; also a context manager.

    Raises: BackendError if it cannot be started, ends, or answers with a fault; with the end of its stderr.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            self._errors.close()
            raise BackendError(f"{self.command[0]}: cannot be started: {error}") from error

    def ask(self, **message: Any) -> Message:
        """The answer to one message."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            answer: Message = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise BackendError(f"{' '.join(self.command)}: ended without an answer.\n{self._tail()}") from error
        if not isinstance(cast(Any, answer), dict):
            raise BackendError(f"{' '.join(self.command)}: answered {answer!r}, which is no object")
        if "error" in answer:
            raise BackendError(f"{' '.join(self.command)}: {answer['error']}")
        return answer

    def _tail(self) -> str:
        self._errors.seek(0)
        return "".join(self._errors.readlines()[-12:])

    def close(self) -> None:
        """End the program: by the end of its input or, when it does not heed that, by a signal."""
        try:
            self._process.communicate(timeout=ENDING_SECONDS)
        except (subprocess.TimeoutExpired, OSError):
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
