"""The record of a tune: what was measured, kept after every picture, so that a run that was ended goes on.

board = Board.open(path, settings)
board.add(candidate, picture=0, score)        # written at once
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated

from sdopt.bench.tune_search import Candidate, Score
from sdopt.bundle.decode import Json, between, decode, encode, integer
from sdopt.bundle.disk import parse_json, read_given, write_named
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError

MAX_BYTES = 1 << 28
RARELY = 20  # of the time, at most a part of one in so many goes to writing the file


@dataclass(frozen=True)
class Settings:
    """What must be the same for measurements to be compared. `bundle`: its digest. `prompts`: one for each picture."""

    bundle: str
    prompts: tuple[str, ...]
    reference: str
    width: int
    height: int
    threads: int
    machine: str
    version: str


@dataclass(frozen=True)
class Measurement:
    """One picture of a candidate: its score, or why it failed."""

    backend: str
    precision: str
    keywords: Mapping[str, Json]
    picture: Annotated[int, integer(0, 1 << 16)]
    seconds: Annotated[float, between(0, 1e6)] = 0.0
    psnr_db: Annotated[float, between(-1000, 200)] = 0.0
    ssim: Annotated[float, between(-1, 1)] = 0.0
    failed: str | None = None


@dataclass(frozen=True)
class TuneRecord:
    """`versions`: of the libraries. `choice`: floor or budget. `presets`: the measured points by their names."""

    settings: Settings
    versions: Mapping[str, str]
    measurements: tuple[Measurement, ...] = ()
    choice: str = ""
    presets: Mapping[str, Json] = field(default_factory=dict[str, Json])


class Board:
    """The measurements so far. `path`: the file of the record; without one they are only in memory.

    Raises (from `open`): UsageError for a file that is no record, or that of another tune.
    """

    def __init__(self, record: TuneRecord, path: Path | None = None) -> None:
        self.record, self._path = record, path
        self._next_write = 0.0
        self._made: dict[str, dict[int, Measurement]] = {}
        for one in record.measurements:
            self._made.setdefault(_key(one), {})[one.picture] = one

    @staticmethod
    def open(path: Path | None, settings: Settings, versions: Mapping[str, str]) -> Board:
        """The record in a file, taken up again; a new one if there is no file."""
        fresh = TuneRecord(settings, versions)
        if path is None or not path.exists():
            return Board(fresh, path)
        try:
            record = decode(TuneRecord, parse_json(read_given(path, MAX_BYTES)))
        except (OSError, ValueError) as error:  # a DecodeError is a ValueError
            raise UsageError(f"{path} is no record of a tune: {error}. Name another file with -o", "output") from error
        mine, theirs = encode(settings), encode(record.settings)
        differ = [name for name in mine if mine[name] != theirs[name]]
        if differ:
            raise UsageError(
                f"{path} is the record of another tune, which differs in {', '.join(differ)}; name another file with "
                "-o, or give the same options",
                "output",
            )
        return Board(replace(record, versions=versions), path)

    @property
    def pictures(self) -> int:
        """How many measurements there are."""
        return len(self.record.measurements)

    def has(self, candidate: Candidate, picture: int) -> bool:
        """Whether a picture of a candidate was measured, or any of its pictures failed."""
        made = self._made.get(candidate.key, {})
        return picture in made or any(one.failed is not None for one in made.values())

    def scores(self, candidate: Candidate) -> Sequence[Score]:
        """Its scores by picture, without a gap; none if a picture failed."""
        made = self._made.get(candidate.key, {})
        found: list[Score] = []
        while (one := made.get(len(found))) is not None:
            if one.failed is not None:
                return []
            found.append(Score(one.seconds, one.psnr_db, one.ssim))
        return found

    def failure(self, candidate: Candidate) -> str:
        """Why it makes no picture; empty if none failed."""
        made = self._made.get(candidate.key, {}).values()
        return next((one.failed for one in made if one.failed is not None), "")

    def add(self, candidate: Candidate, picture: int, score: Score) -> None:
        """Keep a score."""
        decibels = max(score.psnr_db, -1000.0) if math.isfinite(score.psnr_db) else -1000.0
        similarity = score.ssim if math.isfinite(score.ssim) else 0.0
        self._add(
            Measurement(
                candidate.backend, candidate.precision, candidate.keywords, picture, score.seconds, decibels, similarity
            )
        )

    def fail(self, candidate: Candidate, picture: int, reason: str) -> None:
        """Keep why a picture cannot be made; no other one of this candidate will be tried."""
        made = Measurement(candidate.backend, candidate.precision, candidate.keywords, picture, failed=_plain(reason))
        self._add(made)

    def finish(self, choice: str, presets: Mapping[str, Json]) -> None:
        """Keep what was chosen."""
        self.record = replace(self.record, choice=choice, presets=presets)
        self.save()

    def save(self) -> None:
        """Write the file now. A long one is written more rarely than after each picture."""
        if self._path is not None:
            started = time.monotonic()
            write_named(self._path, json.dumps(encode(self.record), ensure_ascii=False) + "\n")
            self._next_write = time.monotonic() + RARELY * (time.monotonic() - started)

    def _add(self, one: Measurement) -> None:
        self._made.setdefault(_key(one), {})[one.picture] = one
        self.record = replace(self.record, measurements=(*self.record.measurements, one))
        if time.monotonic() >= self._next_write:
            self.save()


def _key(one: Measurement) -> str:
    return Candidate(one.backend, one.precision, one.keywords).key


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
