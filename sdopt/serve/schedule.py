"""Who is next: which waiting order gets a slot, which group of orders gets the next call, and who of a group is in it.

All of it is arithmetic on what it is given, times included, so that the server and the simulator of
`benchmarks/serve_sim.py` decide alike.

* A slot goes to the caller who was served least, as start-time fair queueing counts it: each caller has a clock that
  his orders advance by their cost. Who waits longer than `PATIENCE` seconds goes first.
* The next call goes to the group that is owed most. While a call takes its seconds, every group earns its part of them,
  by its number of orders, and the one that runs pays them all. A group whose weights are not loaded must be owed what
  loading them costs besides, so that weights change seldom.
* In a group that has more orders than a call should take, those with the least work left go first, and before them
  those that are late: under way for more than `LATE` times the seconds that they would take alone.

Ref: Goyal et al. 1996, Start-time fair queueing; Shreedhar and Varghese 1995, deficit round robin, for what is owed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

PATIENCE = 60.0  # seconds
LATE = 4.0


@dataclass(frozen=True)
class Ticket:
    """An order as the schedule sees it. `cost`: seconds of work. `arrived`: on the clock of whoever asks."""

    id: str
    caller: str
    cost: float
    arrived: float


class Waiting:
    """The orders that have no slot yet."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._tickets: dict[str, tuple[float, Ticket]] = {}  # by id, with the caller's clock at its start
        self._clocks: dict[str, float] = {}
        self._now = 0.0  # the clock of the order that got the last slot

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def cost(self) -> float:
        """The seconds of all that waits."""
        return sum(ticket.cost for _, ticket in self._tickets.values())

    def push(self, ticket: Ticket) -> None:
        start = max(self._now, self._clocks.get(ticket.caller, 0.0))
        self._clocks[ticket.caller] = start + ticket.cost
        self._tickets[ticket.id] = (start, ticket)

    def pop(self, now: float) -> Ticket:
        """The order that gets the next slot. Raises: KeyError if none waits."""
        oldest = min(self._tickets.values(), key=lambda pair: pair[1].arrived, default=None)
        if oldest is None:
            raise KeyError("nothing waits")
        is_late = now - oldest[1].arrived > self._patience
        start, ticket = oldest if is_late else min(self._tickets.values(), key=lambda p: (p[0], p[1].arrived))
        del self._tickets[ticket.id]
        self._now = max(self._now, start)
        self._forget_idle()
        return ticket

    def remove(self, id: str) -> bool:
        """Forget an order. Whether it was there. What it would have cost is given back to its caller."""
        pair = self._tickets.pop(id, None)
        if pair is None:
            return False
        self._clocks[pair[1].caller] -= pair[1].cost
        self._forget_idle()
        return True

    def position(self, id: str) -> int | None:
        """How many orders get their slot before it, as things are; None if it does not wait."""
        if id not in self._tickets:
            return None
        own = self._tickets[id]
        return sum((start, t.arrived) < (own[0], own[1].arrived) for start, t in self._tickets.values())

    def _forget_idle(self) -> None:
        """Forget the callers whose clock is behind: a new order of theirs starts now anyway."""
        if len(self._clocks) > 2 * len(self._tickets) + 100:
            self._clocks = {caller: clock for caller, clock in self._clocks.items() if clock > self._now}


@dataclass
class Turns:
    """What each group is owed, in seconds."""

    _owed: dict[Hashable, float] = field(default_factory=dict[Hashable, float])

    def choose(self, groups: Mapping[Hashable, float]) -> Hashable:
        """The group that gets the next call; `groups` has the seconds that changing to its weights would cost."""
        return max(groups, key=lambda key: self._owed.get(key, 0.0) - groups[key])

    def paid(self, key: Hashable, seconds: float, orders: Mapping[Hashable, int]) -> None:
        """Group `key` had a call of so many seconds; `orders`: how many each group had then."""
        total = sum(orders.values())
        owed = {other: self._owed.get(other, 0.0) + seconds * count / total for other, count in orders.items()}
        owed[key] = owed.get(key, 0.0) - seconds
        self._owed = owed  # a group that has gone is owed nothing


@dataclass(frozen=True)
class Standing:
    """How an order stands. `left`: seconds of work left; `alone`: what all of it would take alone."""

    id: str
    left: float
    alone: float
    started: float


def first(standings: Sequence[Standing], most: int, now: float) -> list[str]:
    """The ids of those that go into the next call, at most `most`, in the order in which they were given."""
    if len(standings) <= most:
        return [standing.id for standing in standings]

    def rank(standing: Standing) -> tuple[bool, float, float]:
        is_late = now - standing.started > LATE * standing.alone
        return (not is_late, standing.started if is_late else standing.left, standing.started)

    chosen = {standing.id for standing in sorted(standings, key=rank)[:most]}
    return [standing.id for standing in standings if standing.id in chosen]
