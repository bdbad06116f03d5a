"""Compare two records of one machine, and tell whether the second is slower than allowed.

A component is too slow when the lower end of the 95 % interval of its slowdown exceeds the limit. So noise alone does
not fail a build.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdopt.bench.record import Record
from sdopt.bench.sides import OURS
from sdopt.bench.stats import Estimate, slowdown, summary
from sdopt.errors import UsageError, choices

MIN_ROUNDS = 5  # fewer tell nothing about a change of a few percent
SAME = ("cpu", "cores", "system", "architecture")


@dataclass(frozen=True)
class Change:
    """One component of one case: medians in seconds, and new / old (1.1: a tenth slower)."""

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


def unlike(old: Record, new: Record) -> list[str]:
    """How the machines differ, one text for each difference."""
    before, after = _machine(old), _machine(new)
    return [f"{key}: {before[key]} and {after[key]}" for key in before if before[key] != after[key]]


def _machine(record: Record) -> dict[str, Any]:
    gpu: Mapping[str, Any] = record["gpu"] or {}
    return {
        **{key: record["machine"][key] for key in SAME},
        "GPU": gpu.get("name"),
        "driver": gpu.get("driver_version"),
    }


def changes(old: Record, new: Record, *, side: str = OURS, against: str | None = None) -> list[Change]:
    """The components of `side` that both records measured. If `against` is given, it is the side of the old record.

    Raises: UsageError when a record has no timings of its side, or the records have nothing in common.
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
    """A change as a JSON object; `too_slow` is null without a limit, and where there are too few rounds."""
    verdict = change.too_slow(fail_over) if fail_over is not None and change.judged else None
    return {**dataclasses.asdict(change), "too_slow": verdict}


Key = tuple[tuple[str, Any], ...]


def _series(record: Record, name: str) -> dict[tuple[Key, str], list[float]]:
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


def _sides(record: Record) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for result in record["results"]:
        for side in result["sides"]:
            yield result, side


def _names(record: Record) -> str:
    return ", ".join(sorted({str(r["case"]["name"]) for r in record["results"]}))
