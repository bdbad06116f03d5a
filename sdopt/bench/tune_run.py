"""Makes the pictures of a tune: in turns, after a warm-up, with as many threads on every engine.

with Bench(bundle, pictures, threads) as bench:
    bench.measure(candidates, 0, deadline)        # adds to the board what is missing there
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from sdopt.bench.machine import machine
from sdopt.bench.timing import turn
from sdopt.bench.tune_record import Board
from sdopt.bench.tune_search import Candidate, Score
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Float32
from sdopt.dataclass import dataclass
from sdopt.engine import choose_backend
from sdopt.errors import SdoptError, UsageError
from sdopt.metrics import psnr, ssim
from sdopt.pipeline import Pipeline, load

Engine = tuple[str, str]  # backend, precision
ROOM = 4  # bytes of memory that an engine may take for each byte of its bundle, which may be in half precision


@dataclass(frozen=True)
class Reference:
    """What pictures are compared with: the bundle's own sampler, or another one, at many steps in fp32."""

    steps: int
    sampler: str = ""

    @property
    def keywords(self) -> dict[str, Any]:
        own = {"sampler": self.sampler} if self.sampler else {}
        return {**own, "num_inference_steps": self.steps}


class Bench:
    """Pipelines by engine, and the reference of each picture.

    All pipelines stay open where they fit in half of the `memory`, in bytes (default: this machine's); otherwise one is
    open at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        prompts: Sequence[str],
        reference: Reference,
        threads: int,
        engines: Sequence[Engine],
        memory: int | None = None,
    ) -> None:
        self.bundle, self.prompts, self.reference, self.threads = bundle, prompts, reference, threads
        size = sum(file.bytes for file in bundle.manifest.files.values())
        self._keeps = size * ROOM * (len(engines) + 1) < (memory or machine()["memory_bytes"]) / 2
        self._open: dict[Engine, Pipeline] = {}
        self._warm: set[Any] = set()
        self._references: dict[int, Float32] = {}

    @property
    def opened(self) -> list[Engine]:
        """The engines whose pipelines are open."""
        return list(self._open)

    def pipe(self, engine: Engine) -> Pipeline:
        """The pipeline on an engine, opened if it is not."""
        if engine not in self._open:
            if not self._keeps:
                self.close()
            self._open[engine] = load(self.bundle.path, engine[0], precision=engine[1], threads=self.threads)
        return self._open[engine]

    def measure(
        self,
        candidates: Sequence[Candidate],
        picture: int,
        board: Board,
        seconds: float | None = None,
        moved: Callable[[], object] = lambda: None,
    ) -> None:
        """Make a picture with each candidate that has not made it.

        Candidates of an engine take turns, and so do the engines: forwards for an even picture, backwards for an odd.
        `seconds`: to end after, without the reference and warming up; the engines share them. The order is shuffled
        then, so that what is left out is not one kind.
        """
        groups: dict[Engine, list[Candidate]] = {}
        for candidate in candidates:
            if not board.has(candidate, picture):
                groups.setdefault((candidate.backend, candidate.precision), []).append(candidate)
        left = seconds
        for k, own in enumerate(turn(list(groups.values()), picture)):
            if left is not None:
                random.Random(picture).shuffle(own)
            exact = self.exact(picture)
            ready = self._ready(turn(own, picture), picture, board)
            started = time.monotonic()
            for candidate in ready:
                if left is not None and time.monotonic() - started > left / (len(groups) - k):
                    break
                self._one(candidate, picture, exact, board)
                moved()
            left = None if left is None else max(0.0, left - (time.monotonic() - started))

    def _ready(self, candidates: Sequence[Candidate], picture: int, board: Board) -> list[Candidate]:
        """Those whose engines are warm now; the others fail on the board."""
        ready: list[Candidate] = []
        for candidate in candidates:
            try:
                self._warm_up(candidate)
                ready.append(candidate)
            except SdoptError as error:
                board.fail(candidate, picture, str(error))
        return ready

    def _one(self, candidate: Candidate, picture: int, exact: Float32, board: Board) -> None:
        try:
            pipe = self.pipe((candidate.backend, candidate.precision))
            started = time.perf_counter()
            made = self._picture(pipe, picture, candidate.keywords)
            seconds = time.perf_counter() - started
        except SdoptError as error:  # e.g. a precision in which the picture is black
            board.fail(candidate, picture, str(error))
            return
        board.add(candidate, picture, Score(seconds, psnr(exact, made, peak=1.0), ssim(exact, made)))

    def _warm_up(self, candidate: Candidate) -> None:
        """Make a short picture where this is the first of its kind, so that what is timed opens no engine."""
        keywords, engine = candidate.keywords, (candidate.backend, candidate.precision)
        kind = (engine, keywords.get("cache_depth"), "guidance_interval" in keywords)
        pipe = self.pipe(engine)  # where another one had to go, nothing is warm any more
        if kind not in self._warm:
            calls = 2 * int(keywords.get("cache_interval", 1)) + 1
            self._picture(pipe, 0, {**keywords, "num_inference_steps": calls})
            self._warm.add(kind)

    def exact(self, picture: int) -> Float32:
        """The reference of a picture, [height, width, 3] from 0 to 1.

        Raises: UsageError for a sampler that draws noise in its steps, which comes to no one picture at many steps.
        """
        if picture not in self._references:
            pipe = self.pipe(choose_backend("auto", "fp32", self.bundle))
            plan = pipe.plan("a cat", seed=0, **self.reference.keywords)
            if plan.table.stochastic:
                raise UsageError(
                    f"{plan.labels.sampler}, this bundle's sampler, draws noise in its steps, so more steps give "
                    "another picture, and not a better one; name a reference: --reference-sampler ddim",
                    "reference_sampler",
                )
            self._references[picture] = self._picture(pipe, picture, self.reference.keywords)
        return self._references[picture]

    def _picture(self, pipe: Pipeline, picture: int, keywords: Any) -> Float32:
        made = pipe(self.prompts[picture], seed=picture, output_type="np", **keywords)
        return made.images[0]

    def close(self) -> None:
        """Close all pipelines."""
        with ExitStack() as stack:
            for pipe in self._open.values():
                stack.callback(pipe.close)
        self._open.clear()
        self._warm.clear()

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
