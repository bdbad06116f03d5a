"""Programs that make pictures in processes of their own. Each reads messages on stdin and answers on stdout.

A message and its answer are one JSON object in a line each:

    {"do": "prepare", ...}                 convert the checkpoint into `cache`, once; not timed
    {"do": "load", ...}                    {"parts": {"import": s, "load": s}, "precision", "backend", "note",
                                            "versions": {name: version}, "takes_latents": true,
                                            "half_level": 0.5 / 255 for a picture that has 8 bits, else 0}
    {"do": "run", "picture": "FILE.npy"}   {"seconds": s}; the picture [batch, height, width, 3] in 0..1 into FILE.npy
    {"do": "memory"}                       {"peak_rss_bytes": n}

`prepare` and `load` carry `case` (the fields of `cases.Case`), `checkpoint`, `bundle`, `cache`, `latents` (a .npy file
of the standard normal latents), `threads` and `device`. If a message fails, the answer is {"error": text}.
Both ends of the protocol are in this module. It needs only Python, so an adapter runs in any environment.
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
    """Answer messages until stdin ends. What libraries print to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        message: Message = json.loads(line)
        try:
            answer = handlers[message["do"]](message)
        except Exception as error:  # libraries raise all kinds of errors; each is an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def memory(message: Message) -> Message:
    """The handler of `memory`, for all programs."""
    return {"peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes() -> int | None:
    """The peak resident memory of this process; None where Linux's /proc is missing.

    It is VmHWM. ru_maxrss of getrusage would be wrong: it starts with the parent's memory at the time of the fork.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


class Program:
    """A running program of this protocol. It is a context manager that ends the program.

    Raises: BackendError if the program cannot be started, ends early (with the end of its stderr), or answers an error.
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
        """Send a message. Returns the answer."""
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
        """End the program by closing its input. If it goes on, it is killed after ENDING_SECONDS."""
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
