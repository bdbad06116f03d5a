"""Calls that tell how long they took, and the order in which several sides take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sdopt.bundle.specs import Array
from sdopt.errors import UsageError


@dataclass(frozen=True)
class Sample:
    """One timed call: seconds of wall clock, what it gave, and seconds of its parts by name (`device`: CUDA events)."""

    seconds: float
    output: Array | None = None
    parts: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Series:
    """The samples of one side: seconds in the order of the rounds, of the whole and of the parts, and one output."""

    seconds: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]
    output: Array | None


Call = Callable[[], Sample]


def timed(call: Callable[[], Array], per: int = 1) -> Call:
    """`call` as a timed one; the time is divided by `per`, for what happens so many times in it."""

    def sample() -> Sample:
        started = time.perf_counter()
        output = call()
        return Sample((time.perf_counter() - started) / per, output)

    return sample


def interleaved(calls: Mapping[str, Call], rounds: int, warmup: int = 1) -> dict[str, Series]:
    """Every call `rounds` times after `warmup` untimed ones: A B C, C B A, A B C ... so that a drift of the machine
    falls on all alike, and round i of one is the pair of round i of another.

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
    return {name: _series(taken) for name, taken in samples.items()}


def turn(names: Sequence[str], i: int) -> list[str]:
    """The order of round `i`: as given, and every other time backwards."""
    return list(names) if i % 2 == 0 else list(reversed(names))


def _series(samples: Sequence[Sample]) -> Series:
    parts = {name: tuple(s.parts[name] for s in samples) for name in samples[0].parts}
    return Series(tuple(s.seconds for s in samples), parts, samples[0].output)
