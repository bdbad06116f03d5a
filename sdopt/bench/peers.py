"""Peers: programs in environments of their own, which are measured beside sdopt through `protocol`.

For timings in turns, a peer is loaded once. For cold starts, a new process is started each time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sdopt.bench.protocol import Program
from sdopt.bench.sides import Inputs
from sdopt.bench.timing import Call, Sample
from sdopt.bundle.decode import DecodeError, Lines, decode
from sdopt.bundle.precision import precision_word
from sdopt.bundle.unfinished import scratch
from sdopt.dataclass import dataclass
from sdopt.errors import BackendError

ROOT = Path(__file__).parents[2]  # where this sdopt is imported from; the working folder may hold another one
CHILD = "import sys; sys.path.insert(0, {root!r}); from sdopt.bench.child import main; main({name!r})"
T = TypeVar("T")
CaseMessage = Mapping[str, Any]  # the fields of `prepare` and `load`


@dataclass(frozen=True)
class Loaded:
    """The answer to `load`."""

    parts: Mapping[str, float]
    backend: str
    precision: str
    note: Lines
    versions: Mapping[str, str]
    takes_latents: bool
    half_level: float


@dataclass(frozen=True)
class Ran:
    """The answer to `run`."""

    seconds: float


@dataclass(frozen=True)
class Used:
    """The answer to `memory`."""

    peak_rss_bytes: int | None


def ask(program: Program, kind: type[T], **message: Any) -> T:
    """Send a message. Returns the program's answer as an object of class `kind`.

    Raises: BackendError with the program's error, or with what is wrong with its answer.
    """
    answer = program.ask(**message)
    try:
        return decode(kind, answer, "answer")
    except DecodeError as error:
        raise BackendError(f"{' '.join(program.command)}: to {message['do']!r}: {error}") from error


class PeerSide:
    """A loaded peer. Its only component is the whole picture.

    Raises: BackendError with the program's error if it cannot be started or loaded.
    """

    kind = "peer"
    engine_bytes: Mapping[str, int] = {}

    def __init__(self, name: str, command: Sequence[str], request: CaseMessage) -> None:
        with Program(command) as converter:
            converter.ask(do="prepare", **request)
        self.name, self.command = name, command
        self._program = Program(command)
        try:
            loaded = ask(self._program, Loaded, do="load", **request)
        except BaseException:
            self._program.close()
            raise
        self.backend, self.precision, self.note = loaded.backend, precision_word(loaded.precision), loaded.note
        self.takes_latents, self.half_level, self.versions = loaded.takes_latents, loaded.half_level, loaded.versions
        self._kept = ExitStack()
        self._folder = self._kept.enter_context(scratch())

    def calls(self, inputs: Inputs) -> Mapping[str, Call]:
        return {"picture": self._picture}

    def _picture(self) -> Sample:
        path = self._folder / "picture.npy"
        ran = ask(self._program, Ran, do="run", picture=str(path))
        return Sample(ran.seconds, np.load(path) if self.takes_latents else None)

    def close(self) -> None:
        self._program.close()
        self._kept.close()


def command_of(name: str, peers: Mapping[str, Sequence[str]]) -> list[str]:
    """The command that runs a side in a process of its own: a peer's command, or `child` of this sdopt."""
    if name in peers:
        return list(peers[name])
    return [sys.executable, "-c", CHILD.format(root=str(ROOT), name=name)]


def cold_start(command: Sequence[str], request: CaseMessage) -> tuple[Sample, int | None]:
    """Start a fresh process and let it make one picture. Returns the timing, and the process's peak memory in bytes.

    Parts of the timing: `start` (of the interpreter), `import`, `load`, `picture`.
    """
    started = time.perf_counter()
    with Program(command) as program:
        parts = dict(ask(program, Loaded, do="load", **request).parts)
        loaded = time.perf_counter()
        ask(program, Ran, do="run", picture=None)
        ended = time.perf_counter()
        peak = ask(program, Used, do="memory").peak_rss_bytes
    parts = {"start": max(loaded - started - sum(parts.values()), 1e-9), **parts, "picture": ended - loaded}
    return Sample(ended - started, parts=parts), peak
