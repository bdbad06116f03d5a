"""What a replica of Ray Serve holds: the same step loop as the worker of `sdopt serve`, with its models.

    handle.options(stream=True).make.remote(order)      lists of events, until the final one
    handle.check.remote(order)                          what an order would take, or why it can never be made

A call of `make` that is cancelled stops its order before the next call of the UNet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sdopt.cluster import ray_module
from sdopt.errors import BundleError, SdoptError
from sdopt.logs import logger
from sdopt.serve.board import Report, board_of
from sdopt.serve.costs import Costs
from sdopt.serve.desk import SILENT
from sdopt.serve.loop import StepLoop
from sdopt.serve.models import Model, open_models
from sdopt.serve.orders import FINAL, Failed, Moved, Order, Told
from sdopt.serve.settings import Settings
from sdopt.serve.warm import warm
from sdopt.serve.worker import BEAT, LOST, Beat, memory_of_process

log = logger(__name__)
GATHER = 0.1  # seconds in which steps without a preview wait for each other: a message for each would cost more
NO_BOUND = 1 << 30  # the front bounds what waits, for all replicas together
LONGEST_TELL = 10.0  # seconds


@dataclass(frozen=True)
class Checked:
    """An order that can be made: seconds of work, calls of the UNet, and the size of its picture in pixels."""

    cost: float
    calls: int
    width: int
    height: int


class Box:
    """The events of one order that were not sent yet. Threads put them, the event loop takes them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: list[Told] = []
        self._some, self._urgent = asyncio.Event(), asyncio.Event()

    def put(self, event: Told) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._add, event)

    def _add(self, event: Told) -> None:
        self._events.append(event)
        self._some.set()
        if not isinstance(event, Moved) or event.preview is not None:
            self._urgent.set()

    async def take(self) -> list[Told]:
        """What has happened, at least one event."""
        await self._some.wait()
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._urgent.wait(), GATHER)
        taken, self._events = self._events, []
        self._some.clear()
        self._urgent.clear()
        return taken


class Engines:
    """One replica. `board`: the name of the board on which it tells how it is.

    Raises: SdoptError where a bundle cannot be opened, or is another one than the other replicas have.
    """

    def __init__(self, settings: Settings, board: str) -> None:
        ray = ray_module()
        logging.basicConfig(format="%(asctime)s %(levelname)s replica %(process)d %(name)s: %(message)s")
        self.name = f"{ray.util.get_node_ip_address()} process {os.getpid()}"
        self._ray, self._board_name, self._settings = ray, board, settings
        self._boxes: dict[str, Box] = {}
        self._submits = ThreadPoolExecutor(1, "sdopt-submit")  # one thread: orders are begun as they come
        self._ended = threading.Event()
        self._board = self._wait_for_board()
        costs = Costs()
        try:
            models = open_models(settings)
            warm(models, costs, settings.slots)
            self._refuse_other_bundles(models)
        except SdoptError as error:
            ray.get(self._board.unable.remote(error))
            raise
        self._models = {name: model.describe() for name, model in models.items()}
        self._loop = StepLoop(
            models,
            self._tell,
            slots=settings.slots,
            joins=settings.batching == "steps",
            queue=NO_BOUND,
            queue_seconds=NO_BOUND,
            costs=costs,
        )
        self._loop.start()
        self._told = time.monotonic()
        threading.Thread(target=self._beat, name="sdopt-beat", daemon=True).start()

    async def make(self, order: Order) -> AsyncGenerator[tuple[str, list[Told]]]:
        """The events of an order as they come, each time with the name of this replica."""
        box = self._boxes[order.id] = Box()
        submitting = asyncio.get_running_loop().run_in_executor(self._submits, self._loop.submit, order)
        try:
            yield self.name, []
            is_done = False
            while not is_done:
                events = await box.take()
                is_done = any(isinstance(event, FINAL) for event in events)
                yield self.name, events
        finally:  # also where the call is cancelled
            self._boxes.pop(order.id, None)
            submitting.add_done_callback(lambda _: self._loop.cancel(order.id))

    async def check(self, order: Order) -> Checked | Failed:
        """What an order would take, or why it can never be made. Nothing is queued."""
        item = await asyncio.to_thread(self._loop.check, order)
        if isinstance(item, Failed):
            return item
        last = item.plan.passes[-1]
        return Checked(item.cost, item.plan.calls, last.width, last.height)

    def check_health(self) -> None:
        """Ray Serve asks this. Raises: RuntimeError where the replica must be started again."""
        problem = self._problem()
        if not problem and time.monotonic() - self._told > SILENT + LONGEST_TELL:
            problem = f"the replica has told nothing of itself for {SILENT:.0f} s"
        if problem:
            raise RuntimeError(problem)

    def _problem(self) -> str:
        """Why no picture is made here any more; empty where all is well."""
        if self._loop.lost is not None:
            return f"the device is lost: {self._loop.lost}"
        if self._loop.status()["busy_seconds"] > self._settings.stuck_seconds:
            return f"one call takes longer than {self._settings.stuck_seconds:.0f} s"
        return ""

    def __del__(self) -> None:
        """Ray Serve calls this when the replica ends in good order."""
        if not hasattr(self, "_loop") or self._ended.is_set():
            return
        self._ended.set()
        self._loop.stop(drain=False)
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._ray.get(self._board.leave.remote(self.name), timeout=1.0)

    def _tell(self, event: Told) -> None:
        box = self._boxes.get(event.id)
        if box is not None:
            box.put(event)

    def _wait_for_board(self) -> Any:
        while True:
            board = board_of(self._ray, self._board_name)
            if board is not None:
                return board
            time.sleep(0.2)  # the front puts it up

    def _refuse_other_bundles(self, models: dict[str, Model]) -> None:
        own = {name: model.pipe.bundle.digest for name, model in models.items()}
        first = self._ray.get(self._board.agree.remote(own))
        for name, digest in own.items():
            if first.get(name) != digest:
                path = self._settings.bundles[name]
                raise BundleError(
                    f"{path} on {self.name} is another bundle than the first replica has: pictures would depend on the "
                    "machine. Copy the same bundle to every machine, or start the server again if it was replaced"
                )

    def _beat(self) -> None:
        """The thread that tells how the replica is. It ends the process where nothing is made in it any more."""
        while not self._ended.wait(BEAT):
            problem = self._problem()
            if problem:
                log.error("%s", problem)
                os._exit(LOST)
            beat = Beat(self._loop.status(), memory_of_process(), self._loop.costs.curves())
            self._told = time.monotonic()
            try:
                self._ray.get(self._board.tell.remote(self.name, Report(self._models, beat)), timeout=LONGEST_TELL)
            except Exception as error:  # the front was started again, and puts up a new board
                log.debug("the board does not answer: %s", error)
                self._board = board_of(self._ray, self._board_name) or self._board
