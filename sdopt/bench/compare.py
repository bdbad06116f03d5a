"""Two records of one machine, side by side, and whether the second is slower than is allowed.

A component is too slow when even the lower end of its slowdown's 95 % interval is past the limit: noise alone does
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
    """In what the machines differ; empty if they are alike."""
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
    """What both records measured of `side`; in the old one the side is `against` where that is given.

    Raises: UsageError when a side is in neither result, or nothing in common was measured.
    """
    before, after = _series(old, against or side), _series(new, side)
    found = [
        Change(case, component, summary(b).median, summary(a).median, min(len(a), len(b)), slowdown(b, a))
        for (key, component), a in after.items()
        if (b := before.get((key, component))) is not None
        for case in [dict(key)["name"]]
    ]
    if not found:
        raise UsageError(
            "the records have nothing in common: a case is the same when its name, model, size, steps, threads and "
            f"device are. Old: {_names(old)}. New: {_names(new)}"
        )
    return found


def table(found: list[Change], fail_over: float | None) -> list[str]:
    """The changes as lines of text."""
    lines = [f"{'case':<16}{'component':<14}{'old ms':>10}{'new ms':>10}{'change':>9}  95 % interval"]
    for c in found:
        interval = f"{c.ratio.low - 1:+.1%} to {c.ratio.high - 1:+.1%}"
        verdict = "" if fail_over is None else "too slow" if c.too_slow(fail_over) else ""
        verdict = verdict if c.judged else f"not judged: {c.rounds} rounds, {MIN_ROUNDS} needed"
        lines.append(
            f"{c.case:<16}{c.component:<14}{1e3 * c.old:>10.3f}{1e3 * c.new:>10.3f}{c.ratio.value - 1:>+9.1%}  "
            f"{interval:<20}{verdict}".rstrip()
        )
    return lines


def to_json(change: Change, fail_over: float | None) -> dict[str, Any]:
    """A change as a JSON object; `too_slow` is null without a limit, and where there are too few rounds."""
    verdict = change.too_slow(fail_over) if fail_over is not None and change.judged else None
    return {**dataclasses.asdict(change), "too_slow": verdict}


Key = tuple[tuple[str, Any], ...]


def _series(record: Record, name: str) -> dict[tuple[Key, str], list[float]]:
    found: dict[tuple[Key, str], list[float]] = {}
    for result, side in _sides(record):
        if side["name"] == name and side["failed"] is None:
            case = {**result["case"], "threads": result["threads"], "device": result["device"]}
            key = tuple(sorted(case.items()))
            found |= {(key, component): series for component, series in side["seconds"].items()}
    if not found:
        names = {side["name"] for _, side in _sides(record)}
        raise UsageError(f"side {name!r} has no timings in this record; there are {choices(name, sorted(names))}")
    return found


def _sides(record: Record) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for result in record["results"]:
        for side in result["sides"]:
            yield result, side


def _names(record: Record) -> str:
    return ", ".join(sorted({str(r["case"]["name"]) for r in record["results"]}))
