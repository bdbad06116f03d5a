"""What the front knows of a place where pictures are made: the orders that have no final event yet, and its workers.

`Device` is the worker process of one device; `RayDevice` is the replicas of a Ray cluster.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdopt.errors import SdoptError
from sdopt.serve.orders import FINAL, Accepted, Event, Failed, Order
from sdopt.serve.settings import Settings
from sdopt.serve.worker import Beat

ATTEMPTS = 2
SILENT = 30.0  # seconds in which a worker that works tells how it is; it does so every second
Listener = Callable[[Event], None]


@dataclass(eq=False)
class Sent:
    """An order that has no final event yet."""

    order: Order
    listener: Listener
    end: float | None
    attempts: int = 1  # with workers that had it under way
    is_accepted: bool = False
    is_begun: bool = False  # the worker has it under way
    is_cancelled: bool = False
    timer: asyncio.TimerHandle | None = None  # of its deadline


@dataclass(frozen=True)
class Member:
    """A worker as operators see it. `beat`: what it last said of itself, if it is known."""

    name: str
    state: str
    restarts: int = 0
    beat: Beat | None = None
    problem: str = ""


@dataclass(eq=False)
class Desk(ABC):
    """Orders go in by `submit`, and their events come out by its listener, all in the event loop."""

    settings: Settings
    name: str = ""
    state: str = "starting"  # ready, restarting, stopped, unable
    problem: str = ""  # why no worker can ever begin
    error: SdoptError | None = None
    models: dict[str, Any] = field(default_factory=dict[str, Any])
    orders: dict[str, Sent] = field(default_factory=dict[str, Sent])

    @abstractmethod
    async def start(self) -> None:
        """Start the workers, and wait until they are ready, or `problem` says why they never will be."""

    @abstractmethod
    def submit(self, order: Order, listener: Listener) -> None:
        """Send an order; `listener` gets its events in the event loop."""

    @abstractmethod
    def cancel(self, id: str) -> None:
        """Nobody wants this order any more."""

    @abstractmethod
    async def stop(self) -> None:
        """End the workers between two calls of the UNet."""

    @property
    @abstractmethod
    def seconds(self) -> float:
        """The seconds of work that are not done, as far as is known."""

    @property
    @abstractmethod
    def members(self) -> Sequence[Member]:
        """The workers."""

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether its workers take orders."""

    @property
    def waiting(self) -> int:
        """The orders that no worker has yet."""
        return 0

    def serves(self, bundle: str) -> bool:
        """Whether it has a bundle; one that has not told yet may have it."""
        return not self.models or bundle in self.models

    @abstractmethod
    def _drop(self, sent: Sent) -> None:
        """Tell the worker that nobody waits for an order."""

    def _enter(self, order: Order, listener: Listener) -> Sent:
        """Take in an order, whose deadline begins."""
        end = None if order.seconds is None else time.monotonic() + order.seconds
        sent = self.orders[order.id] = Sent(order, listener, end)
        if order.seconds is not None:
            sent.timer = asyncio.get_running_loop().call_later(order.seconds, self._late, sent)
        return sent

    def _late(self, sent: Sent) -> None:
        """The deadline of an order is over, whatever its worker does."""
        if self.orders.get(sent.order.id) is not sent:
            return
        self._drop(sent)
        text = f"it was not done in {sent.order.seconds:.1f} s; try again later, or ask for fewer steps"
        self._final(sent, Failed(sent.order.id, "late", text))

    def _event(self, sent: Sent, event: Event) -> None:
        """Pass on what a worker says of an order."""
        if isinstance(event, FINAL):
            self._final(sent, event)
            return
        if isinstance(event, Accepted):
            if sent.is_accepted:  # by a worker that died
                return
            sent.is_accepted = True
        sent.listener(event)

    def _final(self, sent: Sent, event: Event) -> None:
        self.orders.pop(sent.order.id, None)
        if sent.timer is not None:
            sent.timer.cancel()
        sent.listener(event)

    def _stop_orders(self) -> None:
        """No order is made any more."""
        for sent in list(self.orders.values()):
            self._final(sent, Failed(sent.order.id, "stopping", "the server is stopping; send it again"))

    def _is_tried_again(self, sent: Sent) -> bool:
        """Its worker has died: whether another one gets the order. Otherwise it has its final event now."""
        sent.attempts += sent.is_begun
        sent.is_begun = False
        if sent.is_cancelled:
            self._final(sent, Failed(sent.order.id, "cancelled", "cancelled"))
            return False
        if sent.attempts > ATTEMPTS:
            text = "the process of the engines died while it had this order, twice; the other orders go on"
            self._final(sent, Failed(sent.order.id, "failed", text))
            return False
        return True

    def _renewed(self, sent: Sent) -> Order:
        """The order with the seconds that are left of it. One that was accepted keeps its place whatever they are."""
        order = replace(sent.order, is_suspect=sent.attempts > 1)
        if sent.end is None or sent.is_accepted:
            return replace(order, seconds=None)
        return replace(order, seconds=max(0.0, sent.end - time.monotonic()))
