"""A case and its outcome as data: what was done, and what came of it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

# outcomes that are right
SAME = "the same picture"
REFUSED = "refused with a sentence"
LEGAL = "a legal change"
DONE = "done"  # of a kill, a storm or a soak: all that was promised held
# outcomes that are faults
OTHER = "another picture, in silence"
NONSENSE = "nonsense was taken"
MUTE = "refused without a sentence"
FOREIGN = "foreign exception"
HANG = "hang"
CRASH = "crash of the process"
HALF = "half-written"
LEFT = "left behind"
GREW = "memory or files grew"
RIGHT = (SAME, REFUSED, LEGAL, DONE)
FAULTS = (OTHER, NONSENSE, MUTE, FOREIGN, HANG, CRASH, HALF, LEFT, GREW)


@dataclass(frozen=True)
class Case:
    """One input of the campaign: equal cases do the same."""

    kind: str
    seed: int
    number: int

    def random(self) -> random.Random:
        return random.Random(f"{self.kind} {self.seed} {self.number}")

    def __str__(self) -> str:
        return f"--kind {self.kind} --seed {self.seed} --case {self.number}"


@dataclass(frozen=True)
class Outcome:
    """What came of a case: one of the names above, what was done, and the library's own words."""

    name: str
    description: str = ""
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        return self.name in FAULTS

    @property
    def signature(self) -> str:
        """What faults of one root have in common: the outcome, the last line of sdopt in a traceback, the error."""
        frames = re.findall(r'File "[^"]*/(sdopt/[^"]+)", line (\d+)', self.detail)
        last = ":".join(frames[-1]) if frames else ""
        error = self.detail.strip().splitlines()[-1].partition(":")[0] if frames else ""
        return f"{self.name} {last} {error}" if last else f"{self.name} {self.description[:40]}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Result = tuple[Case, Outcome, float]  # and the seconds that it took


def table(results: Iterable[Result]) -> str:
    """The number of cases by kind and outcome: a row for each kind, a column for each outcome that came up.

    The third column is the mean time of a case, in milliseconds.
    """
    counts: dict[str, dict[str, int]] = {}
    seconds: dict[str, float] = {}
    for case, outcome, took in results:
        row = counts.setdefault(case.kind, {})
        row[outcome.name] = row.get(outcome.name, 0) + 1
        seconds[case.kind] = seconds.get(case.kind, 0.0) + took
    columns = [name for name in (*RIGHT, *FAULTS) if any(name in row for row in counts.values())]

    def line(name: str, row: dict[str, int], took: float) -> list[str]:
        cases = sum(row.values())
        return [
            name,
            str(cases),
            f"{1000 * took / max(1, cases):.0f}",
            *(str(row.get(column, 0)) for column in columns),
        ]

    total = {column: sum(row.get(column, 0) for row in counts.values()) for column in columns}
    lines = [["kind", "cases", "ms", *columns], *(line(kind, row, seconds[kind]) for kind, row in counts.items())]
    lines.append(line("all", total, sum(seconds.values())))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def rate(results: Iterable[Result], seconds: float) -> str:
    """How many inputs and kills there were in this time."""
    kinds = [case.kind for case, _, _ in results]
    kills = kinds.count("kills")
    inputs = len(kinds) - kills
    return f"{inputs} inputs and {kills} kills in {seconds / 60:.1f} minutes: {inputs / seconds:.1f} inputs a second"
