"""Which settings are worth more measurements: the frontier of time and fidelity, and successive halving.

    best = search(candidates, pictures=8, measure, board)

In the first rung every candidate makes one picture. The half that is nearest to the frontier stays, and makes another;
of these half stays, and makes two more, and so on. So most of the time goes to the settings that may be the best.

Ref: Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization",
arXiv:1502.07943, section 3.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence

from sdopt.bundle.decode import Json
from sdopt.dataclass import dataclass


@dataclass(frozen=True)
class Candidate:
    """An engine, and what a request sets. A lever of the future, such as another decoder, is one more keyword."""

    backend: str
    precision: str
    keywords: Mapping[str, Json]

    @property
    def key(self) -> str:
        """The same for the same settings."""
        return json.dumps([self.backend, self.precision, self.keywords], sort_keys=True)

    def __str__(self) -> str:
        keywords = ", ".join(f"{name}={value}" for name, value in self.keywords.items())
        return f"{self.backend} in {self.precision}{', ' if keywords else ''}{keywords}"


@dataclass(frozen=True)
class Score:
    """One picture of a candidate: seconds, and how near it is to the reference."""

    seconds: float
    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class Point:
    """A candidate over several pictures: the median of the seconds, the PSNR of the mean error, the mean SSIM."""

    candidate: Candidate
    pictures: int
    seconds: float
    psnr_db: float
    ssim: float


def point(candidate: Candidate, scores: Sequence[Score]) -> Point:
    """The scores of a candidate as one point. Errors are averaged, and not decibels: one bad picture counts."""
    error = statistics.fmean(10 ** (-score.psnr_db / 10) for score in scores)
    return Point(
        candidate,
        len(scores),
        statistics.median(score.seconds for score in scores),
        -10 * math.log10(error),
        statistics.fmean(score.ssim for score in scores),
    )


def gaps(points: Sequence[Point]) -> dict[str, float]:
    """How many dB each candidate is below the best that is as fast or faster; 0 on the frontier."""
    found, best = dict[str, float](), -math.inf
    for one in sorted(points, key=lambda p: (p.seconds, -p.psnr_db)):
        found[one.candidate.key] = max(0.0, best - one.psnr_db)
        best = max(best, one.psnr_db)
    return found


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in time and PSNR, the fastest first. Of equal ones the first stays."""
    kept: list[Point] = []
    for one in sorted(points, key=lambda p: (p.seconds, -p.psnr_db)):
        if not kept or one.psnr_db > kept[-1].psnr_db:
            kept.append(one)
    return kept


def survivors(points: Sequence[Point], keep: int, always: Collection[str] = ()) -> list[Candidate]:
    """The `keep` candidates that are nearest to the frontier, all that are on it, and those whose keys are `always`."""
    gap = gaps(points)
    order = sorted(points, key=lambda p: gap[p.candidate.key])
    near = {p.candidate.key for p in order[:keep]}
    return [
        p.candidate for p in points if p.candidate.key in near or p.candidate.key in always or gap[p.candidate.key] == 0
    ]


def rungs(pictures: int) -> list[int]:
    """How many pictures a candidate has made after each rung: 1, 2, 4, ... and at last all."""
    return [*(1 << k for k in range(pictures.bit_length()) if 1 << k < pictures), pictures]


Scores = Callable[[Candidate], Sequence[Score]]  # of a candidate, by its pictures, as far as they are measured
Measure = Callable[[Sequence[Candidate], int, bool], None]  # (candidates, picture, whether time may run out)


def search(
    candidates: Sequence[Candidate],
    pictures: int,
    measure: Measure,
    scores: Scores,
    always: Collection[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """The points of the candidates that are left at the end, each over all pictures.

    `measure` makes the pictures that are missing. It may leave some out in the first rung, when its time is up, and
    those that fail: such candidates are left out. `always`: keys of candidates that stay to the end.
    """
    left, done = list(candidates), 0
    for rung in rungs(pictures):
        report(f"{len(left)} candidates, picture {done + 1}" + (f" to {rung}" if rung > done + 1 else ""))
        for picture in range(done, rung):
            measure(left, picture, rung == 1)
        left = [candidate for candidate in left if len(scores(candidate)) >= rung]
        points = [point(candidate, scores(candidate)[:rung]) for candidate in left]
        if rung == pictures:
            return points
        left, done = survivors(points, math.ceil(len(left) / 2), always), rung
    return []
