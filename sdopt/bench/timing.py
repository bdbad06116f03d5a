"""Timed calls, and the order in which several sides take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import TypeVar

from sdopt.bundle.specs import Array
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One timed call: its seconds, its output, and the seconds of its parts by name."""

    seconds: float
    output: Array | None = None
    parts: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Series:
    """The samples of one side in the order of the rounds: seconds of the calls and of their parts, and one output."""

    seconds: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]
    output: Array | None


Call = Callable[[], Sample]


def timed(call: Callable[[], Array], per: int = 1) -> Call:
    """`call` as a timed call. Its time is divided by `per`: how many times the call does what is measured."""

    def sample() -> Sample:
        started = time.perf_counter()
        output = call()
        return Sample((time.perf_counter() - started) / per, output)

    return sample


def interleaved(calls: Mapping[str, Call], rounds: int, warmup: int = 1) -> dict[str, Series]:
    """Make `warmup` untimed calls of each side, then `rounds` rounds of timed ones in the order A B C, C B A, A B C ...

    So a drift of the machine affects all sides alike, and timings of the same round can be compared as pairs.
    Raises: UsageError unless rounds >= 1 and warmup >= 0.
    """
    if rounds < 1 or warmup < 0:
        raise UsageError(f"rounds = {rounds}, warmup = {warmup}; allowed are 1 or more rounds, 0 or more warm-up calls")
    for call in calls.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in turn(list(calls), i):
            samples[name].append(calls[name]())
    return {name: _series(side_samples) for name, side_samples in samples.items()}


def turn(sides: Sequence[T], i: int) -> list[T]:
    """The order of round `i`: as given if `i` is even, otherwise backwards."""
    is_even = i % 2 == 0
    return list(sides) if is_even else list(reversed(sides))


def _series(samples: Sequence[Sample]) -> Series:
    seconds = tuple(sample.seconds for sample in samples)
    parts = {name: tuple(sample.parts[name] for sample in samples) for name in samples[0].parts}
    return Series(seconds, parts, samples[0].output)
