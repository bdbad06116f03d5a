"""A device as the front sees it: a worker process that takes orders, and is started again when it dies.

The front lives in asyncio. What a worker says is read by a thread and handed over. Orders that a dead worker leaves
behind are sent to the next one, once: an order that two workers did not survive fails.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import queue
import threading
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, cast

from sdopt.logs import logger
from sdopt.serve.desk import SILENT, Desk, Listener, Member, Sent
from sdopt.serve.models import open_models
from sdopt.serve.orders import Begun, Event, Failed, Order
from sdopt.serve.worker import Beat, Cancel, Opens, Ready, Stop, Unable, work

log = logger(__name__)
LONGEST_PAUSE = 30.0  # seconds before a worker is started again
LONGEST_END = 10.0  # seconds until a worker that should end is killed


@dataclass(eq=False)
class Device(Desk):
    """The worker of one device, and the orders that it has.

    `opens`: what the worker opens before it takes orders. `warms`: it also makes a picture and measures its calls.
    """

    opens: Opens = open_models
    warms: bool = True
    beat: Beat | None = None
    restarts: int = 0
    heard: float = 0.0  # when the worker last told how it is
    _failures: int = 0  # workers in a row that died before they were ready
    _pipe: Connection | None = None
    _outbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue[Any])
    _process: Any = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _gone: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[Any] = field(default_factory=set[Any])

    async def start(self) -> None:
        """Start the worker, and wait until it is ready.

        Raises: OSError where no process can be started. What the worker says against its bundles is `problem`.
        """
        self._start()
        self._tasks.add(asyncio.create_task(self._watch()))
        waits = [asyncio.create_task(event.wait()) for event in (self._ready, self._gone)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for one in waits:
            one.cancel()

    def submit(self, order: Order, listener: Listener) -> None:
        sent = self._enter(order, listener)
        if self.state == "ready":
            self._send(order)
        elif len(self.orders) > self.settings.slots + self.settings.queue:  # while no worker says so
            self._final(sent, Failed(order.id, "full", "the engines are starting, and the queue is full", None, 5.0))
        elif self.state in ("stopped", "unable"):
            self._final(sent, Failed(order.id, "stopping", self.problem or "the server is stopping"))

    def cancel(self, id: str) -> None:
        """Nobody wants this order any more."""
        sent = self.orders.get(id)
        if sent is None:
            return
        sent.is_cancelled = True  # also for a worker that dies before it reads this
        if self.state == "ready":
            self._send(Cancel(id))
        else:
            self._final(sent, Failed(id, "cancelled", "cancelled"))

    def _drop(self, sent: Sent) -> None:
        if self.state == "ready":
            self._send(Cancel(sent.order.id))

    @property
    def is_silent(self) -> bool:
        """Whether a worker that should tell how it is has not done so for long."""
        return self.state == "ready" and time.monotonic() - self.heard > SILENT

    @property
    def seconds(self) -> float:
        """The seconds of work that the worker had when it last said so, and what was sent since."""
        return 0.0 if self.beat is None else float(self.beat.status["backlog_seconds"])

    @property
    def members(self) -> tuple[Member, ...]:
        state = "silent" if self.is_silent else self.state
        return (Member(self.name, state, self.restarts, self.beat, self.problem),)

    @property
    def is_ready(self) -> bool:
        return self.state == "ready" and not self.is_silent

    async def stop(self) -> None:
        """End the worker between two calls of the UNet."""
        if self.state in ("stopped", "unable"):
            return
        was_ready, self.state = self.state == "ready", "stopped"
        if self._process is None:
            return
        if not was_ready:  # nothing is under way
            self._stop_orders()
            self._gone.set()
        self._send(Stop())
        try:
            await asyncio.wait_for(self._gone.wait(), LONGEST_END)
        except (asyncio.TimeoutError, TimeoutError):
            log.warning("the worker of %s does not end; it is killed", self.name or "this machine")
        self.kill()
        await asyncio.to_thread(self._process.join)
        for task in self._tasks:
            task.cancel()

    @property
    def failures(self) -> int:
        """How many workers in a row died before they were ready."""
        return self._failures

    def give_up(self, problem: str) -> None:
        """Start no worker any more; orders fail."""
        self.state, self.problem = "unable", problem
        for sent in list(self.orders.values()):
            self._final(sent, Failed(sent.order.id, "stopping", problem))
        self._gone.set()

    def kill(self) -> None:
        """End the worker now; it is started again."""
        if self._process is not None:
            self._process.kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        own, its = context.Pipe()
        settings = self.settings
        if self.name:
            settings = replace(settings, backend=f"{settings.backend.partition(':')[0]}:{self.name}")
        level = logging.getLogger("sdopt").getEffectiveLevel()
        process = context.Process(
            target=work, args=(its, settings, level, self.opens, self.warms), name="sdopt-worker", daemon=True
        )
        process.start()
        its.close()
        self._pipe, self._process, self._outbox = own, process, queue.SimpleQueue()
        loop = asyncio.get_running_loop()
        threading.Thread(target=_write, args=(own, self._outbox), name="sdopt-orders", daemon=True).start()
        threading.Thread(target=self._read, args=(own, loop), name="sdopt-events", daemon=True).start()

    def _read(self, pipe: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """The thread that reads what one worker says, until it says no more."""
        while True:
            try:
                message: Any = pipe.recv()
            except (EOFError, OSError, Exception):  # half a message of a killed process can be anything
                message = None
            try:
                loop.call_soon_threadsafe(self._take, pipe, message)
            except RuntimeError:  # the event loop is closed
                return
            if message is None:
                return

    def _take(self, pipe: Connection, message: Any) -> None:
        """One message, in the event loop."""
        if pipe is not self._pipe:
            return
        if message is None:
            self._ended()
        elif isinstance(message, Ready):
            self.models, self._failures, self.heard = message.models, 0, time.monotonic()
            self._ready.set()
            if self.state == "stopped":
                return
            self.state = "ready"
            for sent in list(self.orders.values()):
                self._send(self._renewed(sent))
        elif isinstance(message, Unable):
            self.error, self.problem = message.error, str(message.error)
        elif isinstance(message, Beat):
            self.beat, self.heard = message, time.monotonic()
        elif isinstance(message, Begun):
            if message.id in self.orders:
                self.orders[message.id].is_begun = True
        else:
            event = cast(Event, message)
            if event.id in self.orders:
                self._event(self.orders[event.id], event)

    def _send(self, message: Any) -> None:
        """Give a message to the thread that writes: a large picture must not hold up the event loop."""
        self._outbox.put(message)

    def _ended(self) -> None:
        """The worker is gone: its orders wait for the next one."""
        assert self._pipe is not None
        self._send(None)
        self._pipe.close()
        self.beat = None
        if self.state in ("stopped", "unable"):
            self._stop_orders()
            self._gone.set()
            return
        if self.problem:  # it would say the same again
            self.state = "unable"
            self._gone.set()
            return
        was_ready, self.state = self.state == "ready", "restarting"
        self.restarts += 1
        self._failures = 0 if was_ready else self._failures + 1
        self._ready.clear()
        log.error("the worker of %s has died; it is started again", self.name or "this machine")
        for sent in list(self.orders.values()):
            self._is_tried_again(sent)
        pause = 0.0 if was_ready else min(LONGEST_PAUSE, 2.0**self._failures)
        self._tasks.add(asyncio.create_task(self._restart(pause)))

    async def _restart(self, pause: float) -> None:
        await asyncio.sleep(pause)
        if self.state == "restarting":
            await asyncio.to_thread(self._process.join)
            self._start()

    async def _watch(self) -> None:
        """Kill a worker whose one call takes too long."""
        while True:
            await asyncio.sleep(1.0)
            beat = self.beat
            if self.is_silent:
                log.error("the worker has told nothing for %.0f s; it is killed", SILENT)
                self.kill()
            elif beat is not None and beat.status["busy_seconds"] > self.settings.stuck_seconds:
                log.error("one call takes longer than %.0f s; the worker is killed", self.settings.stuck_seconds)
                self.beat = None
                self.kill()


def _write(pipe: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    """The thread that sends to one worker, until the worker is gone."""
    while (message := outbox.get()) is not None:
        try:
            pipe.send(message)
        except OSError:  # it has died, and `_read` tells
            return
