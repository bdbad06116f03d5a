"""Which case comes next: every kind gets its part of the time, whenever the campaign ends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from tests.campaign.cases import Case
from tests.campaign.kinds import KINDS

QUICK = "quick"  # all kinds that share the number of inputs


class Schedule:
    """The cases of a campaign. A case of the group that has had the least of its part of the time comes first.

    `counts`: how many cases of each kind that has its own number.
    """

    def __init__(self, kinds: Sequence[str], seed: int, inputs: int, counts: Mapping[str, int]) -> None:
        self._seed = seed
        self._quick = {kind: KINDS[kind].share for kind in kinds if KINDS[kind].share}
        self._left = {kind: counts[kind] for kind in kinds if not KINDS[kind].share}
        if self._quick:
            self._left[QUICK] = inputs
        long = sum(KINDS[kind].time for kind in self._left if kind != QUICK)
        self._parts = {kind: 100 - long if kind == QUICK else KINDS[kind].time for kind in self._left}
        self._spent = dict.fromkeys(self._left, 0.0)
        self._number = dict.fromkeys(kinds, 0)
        self._running: dict[Case, float] = {}

    def next(self) -> Case | None:
        """The next case; None when all are done."""
        now = time.monotonic()
        spent = dict(self._spent)
        for case, start in self._running.items():
            spent[self._group(case.kind)] += now - start
        group = min((g for g in self._left if self._left[g]), key=lambda g: spent[g] / self._parts[g], default=None)
        if group is None:
            return None
        self._left[group] -= 1
        kind = min(self._quick, key=lambda k: self._number[k] / self._quick[k]) if group == QUICK else group
        case = Case(kind, self._seed, self._number[kind])
        self._number[kind] += 1
        self._running[case] = now
        return case

    def ended(self, case: Case) -> float:
        """Take note that a case has ended. Returns its seconds."""
        seconds = time.monotonic() - self._running.pop(case)
        self._spent[self._group(case.kind)] += seconds
        return seconds

    def _group(self, kind: str) -> str:
        return QUICK if kind in self._quick else kind
