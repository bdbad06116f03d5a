"""Compare two records of one machine, and decide whether the second is slower than allowed.

A component is too slow if the lower end of the 95 % interval of its slowdown exceeds the limit. So noise alone does not
fail a build.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sdopt.bench.record import BenchRecord, Result, SideResult
from sdopt.bench.sides import OURS
from sdopt.bench.stats import Estimate, slowdown, summary
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices

MIN_ROUNDS = 5  # fewer say nothing about a change of a few percent
COMPARED_FIELDS = ("cpu", "cores", "system", "architecture")  # of the machine; they have to be equal


@dataclass(frozen=True)
class Change:
    """One component of one case: medians in seconds, and the ratio new / old (1.1 is a tenth slower)."""

    case: str
    component: str
    old: float
    new: float
    rounds: int
    ratio: Estimate

    @property
    def judged(self) -> bool:
        """Whether there are enough rounds for a verdict."""
        return self.rounds >= MIN_ROUNDS

    def too_slow(self, fail_over: float) -> bool:
        return self.judged and self.ratio.low > 1 + fail_over


def unlike(old: BenchRecord, new: BenchRecord) -> list[str]:
    """The differences between the machines, one text for each."""
    before, after = _machine(old), _machine(new)
    return [f"{key}: {before[key]} and {after[key]}" for key in before if before[key] != after[key]]


def _machine(record: BenchRecord) -> dict[str, Any]:
    gpu: Mapping[str, Any] = record["gpu"] or {}
    return {
        **{key: record["machine"][key] for key in COMPARED_FIELDS},
        "GPU": gpu.get("name"),
        "driver": gpu.get("driver_version"),
    }


def changes(old: BenchRecord, new: BenchRecord, *, side: str = OURS, against: str | None = None) -> list[Change]:
    """The changes of all components of `side` that both records measured.

    If `against` is given, it is the side of the old record, and `side` that of the new one.
    Raises: UsageError if a record has no timings of its side, or the records have nothing in common.
    """
    before, after = _series(old, against or side), _series(new, side)
    compared: list[Change] = []
    for (key, component), new_series in after.items():
        old_series = before.get((key, component))
        if old_series is None:
            continue
        change = Change(
            case=dict(key)["name"],
            component=component,
            old=summary(old_series).median,
            new=summary(new_series).median,
            rounds=min(len(old_series), len(new_series)),
            ratio=slowdown(old_series, new_series),
        )
        compared.append(change)
    if not compared:
        raise UsageError(
            "the records have nothing in common: a case is the same when its name, model, size, steps, threads and "
            f"device are. Old: {_names(old)}. New: {_names(new)}"
        )
    return compared


def table(compared: list[Change], fail_over: float | None) -> list[str]:
    """The changes as lines of text."""
    lines = [f"{'case':<16}{'component':<14}{'old ms':>10}{'new ms':>10}{'change':>9}  95 % interval"]
    for change in compared:
        names = f"{change.case:<16}{change.component:<14}"
        medians = f"{1e3 * change.old:>10.3f}{1e3 * change.new:>10.3f}{change.ratio.value - 1:>+9.1%}"
        interval = f"{change.ratio.low - 1:+.1%} to {change.ratio.high - 1:+.1%}"
        lines.append(f"{names}{medians}  {interval:<20}{_verdict(change, fail_over)}".rstrip())
    return lines


def _verdict(change: Change, fail_over: float | None) -> str:
    if not change.judged:
        return f"not judged: {change.rounds} rounds, {MIN_ROUNDS} needed"
    if fail_over is not None and change.too_slow(fail_over):
        return "too slow"
    return ""


def to_json(change: Change, fail_over: float | None) -> dict[str, Any]:
    """A change as a JSON object. `too_slow` is null without a limit, and with too few rounds."""
    verdict = change.too_slow(fail_over) if fail_over is not None and change.judged else None
    return {**dataclasses.asdict(change), "too_slow": verdict}


Key = tuple[tuple[str, Any], ...]


def _series(record: BenchRecord, name: str) -> dict[tuple[Key, str], list[float]]:
    """The timings of one side, by case and component."""
    timings: dict[tuple[Key, str], list[float]] = {}
    for result, side in _sides(record):
        if side["name"] == name and side["failed"] is None:
            case = {**result["case"], "threads": result["threads"], "device": result["device"]}
            key = tuple(sorted(case.items()))
            for component, series in side["seconds"].items():
                timings[key, component] = series
    if not timings:
        names = {side["name"] for _, side in _sides(record)}
        raise UsageError(f"side {name!r} has no timings in this record; there are {choices(name, sorted(names))}")
    return timings


def _sides(record: BenchRecord) -> Iterator[tuple[Result, SideResult]]:
    for result in record["results"]:
        for side in result["sides"]:
            yield result, side


def _names(record: BenchRecord) -> str:
    return ", ".join(sorted({str(result["case"]["name"]) for result in record["results"]}))
