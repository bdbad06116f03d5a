"""The replicas of a Ray cluster, as the front sees them: one place that takes orders, whatever machine makes them.

Orders that no replica has room for wait here, in the order that a worker's queue would have: each caller has his share,
a new replica takes what waits, and a dead one loses little. The order of a replica that dies is sent once more. Its
seed is in it, so that its picture is the same.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, cast

from sdopt.cluster import ray_module
from sdopt.errors import BackendError, SdoptError
from sdopt.logs import logger
from sdopt.serve.board import Reading, Report, put_up
from sdopt.serve.desk import SILENT, Desk, Listener, Member, Sent
from sdopt.serve.engines import Checked
from sdopt.serve.orders import Accepted, Begun, Failed, Order
from sdopt.serve.schedule import Ticket, Waiting

log = logger(__name__)
POLL = 0.5  # seconds between two looks at the board
PAUSE = 0.2  # seconds until the order of a dead replica is sent once more; Ray Serve has learned of its death then
SPARE = 1  # orders that a replica has beside its slots, so that a slot is never empty
UNKNOWN = 1.0  # seconds of work of an order that was not checked


@dataclass(eq=False)
class RayDevice(Desk):
    """`opens` gives the handle of the replicas, and `closes` ends them; both may block. `least`: replicas at start."""

    board: str = ""
    opens: Callable[[], Any] = lambda: None
    closes: Callable[[], None] = lambda: None
    least: int = 1
    restarts: int = 0
    _handle: Any = None
    _board: Any = None
    _members: dict[str, Report] = field(default_factory=dict[str, Report])
    _dead: set[str] = field(default_factory=set[str])
    _waiting: Waiting = field(default_factory=Waiting)
    _tickets: dict[str, Ticket] = field(default_factory=dict[str, Ticket])
    _responses: dict[str, Any] = field(default_factory=dict[str, Any])  # of the orders that replicas have
    _holders: dict[str, tuple[str, Any]] = field(default_factory=dict[str, tuple[str, Any]])  # replica, and who listens
    _settled: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[Any] = field(default_factory=set[Any])

    async def start(self) -> None:
        try:
            ray = ray_module()
            self._handle = await asyncio.to_thread(self.opens)  # first: it connects to the cluster
            self._board = await asyncio.to_thread(put_up, ray, self.board)
        except SdoptError as error:
            self._unable(error)
            return
        except Exception as error:  # Ray's own ones, of many kinds
            self._unable(BackendError(f"the replicas cannot be started: {error}"))
            return
        self._spawn(self._watch(ray))
        await self._settled.wait()

    def submit(self, order: Order, listener: Listener) -> None:
        sent = self._enter(order, listener)
        self._tickets[order.id] = Ticket(order.id, order.caller, UNKNOWN, time.monotonic())
        if self.state in ("stopped", "unable"):
            self._final(sent, Failed(order.id, "stopping", self.problem or "the server is stopping"))
        elif len(self.orders) > max(1, len(self._members)) * (self.settings.slots + self.settings.queue):
            text = f"{len(self.orders) - 1} requests are not done yet; try again later"
            text = text if self._members else "the engines are starting, and the queue is full"
            self._final(sent, Failed(order.id, "full", text, None, self._after() if self._members else 5.0))
        elif not self._members:
            self._waiting.push(self._tickets[order.id])
        elif self._is_free and not len(self._waiting):
            self._send(sent)
        else:
            self._spawn(self._queue(sent))

    def cancel(self, id: str) -> None:
        sent = self.orders.get(id)
        if sent is not None:
            self._drop(sent)
            self._final(sent, Failed(id, "cancelled", "cancelled"))

    @property
    def seconds(self) -> float:
        return self._backlog / max(1, len(self._members))

    @property
    def members(self) -> list[Member]:
        """The replicas that have told of themselves; one that stands for all where there is none."""
        found = [Member(name, "ready", 0, report.beat) for name, report in self._members.items()]
        if not found:
            return [Member("replicas", self.state, self.restarts, None, self.problem)]
        # Ray Serve gives replicas no places, so the first one stands for those that are not there
        return [replace(found[0], restarts=self.restarts, problem=self.problem), *found[1:]]

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def stop(self) -> None:
        if self.state == "stopped":
            return
        self.state = "stopped"
        for response in self._responses.values():
            response.cancel()
        self._stop_orders()
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.closes)

    @property
    def _backlog(self) -> float:
        """The seconds of all that is not done, on one replica."""
        return self._waiting.cost + sum(one.beat.status["backlog_seconds"] for one in self._members.values())

    @property
    def _is_free(self) -> bool:
        """Whether a replica has room for one more order."""
        return len(self._responses) < len(self._members) * (self.settings.slots + SPARE)

    def _after(self) -> float:
        """The seconds until an order is done, and another one may come."""
        return min(120.0, max(0.25, self.seconds / max(1, len(self.orders))))

    def _drop(self, sent: Sent) -> None:
        id = sent.order.id
        sent.is_cancelled = True
        self._waiting.remove(id)
        if id in self._responses:
            self._responses[id].cancel()

    def _final(self, sent: Sent, event: Any) -> None:
        self._tickets.pop(sent.order.id, None)
        super()._final(sent, event)

    def _is_wanted(self, sent: Sent) -> bool:
        return self.orders.get(sent.order.id) is sent

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -------------------------------------------------------------------------------------------------- what waits

    async def _queue(self, sent: Sent) -> None:
        """Let an order wait for a replica with room, if one says that it can be made at all."""
        try:
            checked: Checked | Failed | None = await self._handle.check.remote(self._renewed(sent))
        except Exception as error:  # that replica is gone; the one that makes it will check it
            log.info("order %s was not checked: %s", sent.order.id, error)
            checked = None
        if not self._is_wanted(sent):
            return
        if checked is not None:
            refused = checked if isinstance(checked, Failed) else self._refused(sent.order, checked.cost)
            if refused is not None:
                self._final(sent, refused)
                return
            self._accept(sent, checked)
        self._waiting.push(self._tickets[sent.order.id])
        self._fill()

    def _accept(self, sent: Sent, checked: Any) -> None:
        ahead, seconds = len(self.orders) - 1, self.seconds + checked.cost
        self._tickets[sent.order.id] = replace(self._tickets[sent.order.id], cost=checked.cost)
        self._event(sent, Accepted(sent.order.id, seconds, ahead, checked.calls, checked.width, checked.height))

    def _refused(self, order: Order, cost: float) -> Failed | None:
        """Why an order may not wait, as `StepLoop` decides it."""
        if self.seconds + cost > self.settings.queue_seconds:
            text = f"the requests before this one need {self.seconds:.0f} s, and "
            text += f"{self.settings.queue_seconds:.0f} are allowed; try again later"
            return Failed(order.id, "full", text, None, self._after())
        if order.seconds is not None and self.seconds + cost > order.seconds:
            text = f"this would be done in {self.seconds + cost:.1f} s, and must be in {order.seconds:.1f} s"
            text += "; try again later, or ask for fewer steps"
            return Failed(order.id, "late", text, None, self._after())
        return None

    def _fill(self) -> None:
        """Send what waits, as far as replicas have room."""
        while self.state == "ready" and len(self._waiting) and self._is_free:
            sent = self.orders.get(self._waiting.pop(time.monotonic()).id)
            if sent is not None:
                self._send(sent)

    # --------------------------------------------------------------------------------------------- what replicas have

    def _send(self, sent: Sent) -> None:
        order = replace(self._renewed(sent), id=f"{sent.order.id}.{secrets.token_hex(4)}")
        response = self._responses[sent.order.id] = self._handle.options(stream=True).make.remote(order)
        self._spawn(self._listen(sent, response))

    async def _listen(self, sent: Sent, response: Any) -> None:
        """Pass on what a replica says of an order, until its final event or the death of the replica."""
        fault = ray_module("ray.exceptions").RayTaskError
        replica, problem = "", cast("BaseException | None", None)
        try:
            async for name, events in response:
                replica = name
                self._holders[sent.order.id] = name, asyncio.current_task()
                for event in events:
                    if not self._is_wanted(sent):
                        break
                    if isinstance(event, Begun):
                        sent.is_begun = True
                    else:
                        self._event(sent, replace(event, id=sent.order.id))
        except Exception as error:  # Ray has many kinds, and all but one are about the replica or the way to it
            problem = error
        except asyncio.CancelledError as error:
            if replica not in self._dead:  # the server ends
                raise
            problem = error
        self._responses.pop(sent.order.id, None)
        self._holders.pop(sent.order.id, None)
        if self._is_wanted(sent) and isinstance(problem, fault):
            log.error("order %s: a fault of sdopt", sent.order.id, exc_info=problem)
            self._final(sent, Failed(sent.order.id, "failed", f"a fault of sdopt: {problem}; please report it"))
        elif self._is_wanted(sent):
            self._died(sent, replica, problem)
        self._fill()

    def _died(self, sent: Sent, replica: str, problem: BaseException | None) -> None:
        log.warning("order %s: its replica is gone: %s", sent.order.id, str(problem).partition("\n")[0])
        if replica in self._members:
            self._lost(replica)
        if self._is_tried_again(sent):
            asyncio.get_running_loop().call_later(PAUSE, self._again, sent)

    def _again(self, sent: Sent) -> None:
        if self._is_wanted(sent):
            self._waiting.push(self._tickets[sent.order.id])
            self._fill()

    def _lost(self, replica: str) -> None:
        """A replica has died. Ray Serve starts another one."""
        log.error("the replica %s has died; Ray Serve starts another one", replica)
        self.restarts += 1
        self._dead.add(replica)
        self._members.pop(replica)
        for id, (holder, listener) in list(self._holders.items()):
            if holder == replica and listener is not asyncio.current_task():  # a silent one may never say more
                self._responses[id].cancel()
                listener.cancel()
        self._board.leave.remote(replica)
        if not self._members and self.state == "ready":
            self.state = "restarting"

    async def _watch(self, ray: Any) -> None:
        """Read the board; put up another one where the process that had it is gone."""
        while True:
            try:
                self._take(await self._board.read.remote())
            except ray.exceptions.RayError as error:
                log.warning("the board is gone: %s", error)
                self._board = await asyncio.to_thread(put_up, ray, self.board)
            await asyncio.sleep(POLL)

    def _take(self, reading: Reading) -> None:
        if self.state == "stopped":
            return
        for name, (age, report) in reading.reports.items():
            if name in self._dead:
                continue
            if age <= SILENT:
                self._members[name] = report
            elif name in self._members:
                self._lost(name)
        for name in [name for name in self._members if name not in reading.reports]:
            del self._members[name]  # it has ended in good order
        self._dead &= set(reading.reports)
        problem = "" if reading.error is None else str(reading.error)
        if problem and problem != self.problem:
            log.error("a replica cannot begin: %s", problem)
        self.problem = problem
        self.models = dict(next(iter(self._members.values())).models) if self._members else self.models
        if self._members and (self.state in ("restarting", "unable") or len(self._members) >= self.least):
            self.state, self.error = "ready", None
            self._settled.set()
        elif not self._members and self.state == "ready":
            self.state = "restarting"
        elif reading.error is not None and not self._members:
            self._unable(reading.error)  # until one can
        self._fill()

    def _unable(self, error: SdoptError) -> None:
        self.error, self.problem, self.state = error, str(error), "unable"
        self._stop_orders()
        self._settled.set()
