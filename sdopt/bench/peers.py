"""Peers: programs in environments of their own, measured beside sdopt through `protocol`.

Warm, a peer is loaded once and takes its turn round by round; cold, it is started anew each time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sdopt.bench.protocol import Program
from sdopt.bench.sides import Inputs
from sdopt.bench.timing import Call, Sample
from sdopt.bundle.decode import DecodeError, Lines, decode
from sdopt.bundle.precision import precision_word
from sdopt.errors import BackendError

ROOT = Path(__file__).parents[2]  # of this very sdopt, whichever is in the working folder
CHILD = "import sys; sys.path.insert(0, {root!r}); from sdopt.bench.child import main; main({name!r})"
T = TypeVar("T")
CaseMessage = Mapping[str, Any]  # what `prepare` and `load` carry


@dataclass(frozen=True)
class Loaded:
    """What a program answers to `load`."""

    parts: Mapping[str, float]
    backend: str
    precision: str
    note: Lines
    versions: Mapping[str, str]
    takes_latents: bool
    half_level: float


@dataclass(frozen=True)
class Ran:
    """What a program answers to `run`."""

    seconds: float


@dataclass(frozen=True)
class Used:
    """What a program answers to `memory`."""

    peak_rss_bytes: int | None


def ask(program: Program, kind: type[T], **message: Any) -> T:
    """The answer to one message.

    Raises: BackendError with what is wrong with it, or what the program said.
    """
    answer = program.ask(**message)
    try:
        return decode(kind, answer, "answer")
    except DecodeError as error:
        raise BackendError(f"{' '.join(program.command)}: to {message['do']!r}: {error}") from error


class PeerSide:
    """A peer, loaded; it makes pictures, and does not tell what is in them part by part.

    Raises: BackendError with what it said when it cannot be started or loaded.
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
        self._folder = tempfile.TemporaryDirectory(prefix="sdopt-bench-")

    def calls(self, inputs: Inputs) -> Mapping[str, Call]:
        return {"picture": self._picture}

    def _picture(self) -> Sample:
        path = Path(self._folder.name) / "picture.npy"
        ran = ask(self._program, Ran, do="run", picture=str(path))
        return Sample(ran.seconds, np.load(path) if self.takes_latents else None)

    def close(self) -> None:
        self._program.close()
        self._folder.cleanup()


def command_of(name: str, peers: Mapping[str, Sequence[str]]) -> list[str]:
    """What starts a side in a process of its own: a peer's command, or this sdopt's own child."""
    return list(peers[name]) if name in peers else [sys.executable, "-c", CHILD.format(root=str(ROOT), name=name)]


def cold_start(command: Sequence[str], request: CaseMessage) -> tuple[Sample, int | None]:
    """A fresh process up to its first picture, and the most memory it had resident (bytes).

    Parts: `start` (the interpreter), `import`, `load`, `picture`.
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
