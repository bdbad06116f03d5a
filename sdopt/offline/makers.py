"""Who makes pictures of orders: a step loop in this process, or several worker processes with one each.

Both hold orders at different steps in the calls of the UNet; see `sdopt.serve.loop`.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, Protocol

from sdopt.engine.cores import usable_cores
from sdopt.errors import BackendError
from sdopt.offline.recipe import NAME, Recipe, model_of, open_engines
from sdopt.pipeline import Pipeline
from sdopt.serve.device import Device
from sdopt.serve.loop import StepLoop
from sdopt.serve.orders import FINAL, Event, Failed, Order, Told
from sdopt.serve.settings import Settings

SLOTS = 8  # pictures under way at once in one process
AHEAD = 2  # orders that wait in it, so that no slot is empty
LONGEST_CALL = 4 * 3600.0  # seconds; a worker whose one call takes longer hangs, and is started again
DEATHS = 3  # workers in a row that die before they are ready
Listener = Callable[[Event], None]


class Maker(Protocol):
    """Whoever makes pictures. `room`: how many orders it should have at once."""

    room: int

    def submit(self, order: Order, listener: Listener) -> None:
        """Make a picture; `listener` hears its events, the last one `Finished` or `Failed`, from another thread."""
        ...

    def close(self) -> None:
        """End before the next call of the UNet."""
        ...


class _Loop(StepLoop):
    """A step loop that says when it has ended, in its own thread."""

    ended: Callable[[], None]

    def run(self) -> None:
        super().run()
        self.ended()


class OneProcess:
    """A step loop in a thread of this process. Raises: BackendError where a backend or an engine is missing."""

    def __init__(self, pipe: Pipeline, slots: int = SLOTS) -> None:
        open_engines(pipe)
        self.room = slots + AHEAD
        self._listeners: dict[str, Listener] = {}
        self._lock = threading.Lock()
        self._loop = _Loop({NAME: model_of(pipe)}, self._tell, slots=slots, queue=1 << 20, queue_seconds=math.inf)
        self._loop.ended = self._refuse_lost
        self._loop.start()

    def submit(self, order: Order, listener: Listener) -> None:
        with self._lock:
            self._listeners[order.id] = listener
        self._loop.submit(order)
        self._refuse_lost()

    def close(self) -> None:
        self._loop.stop(drain=False)

    def _refuse_lost(self) -> None:
        """Where the device is lost to this process, no order is made any more."""
        if self._loop.lost is None:
            return
        with self._lock:
            left = list(self._listeners)
        for id in left:
            self._tell(Failed(id, "stopping", f"{self._loop.lost}; run the same command again to make the rest"))

    def _tell(self, event: Told) -> None:
        with self._lock:
            listener = self._listeners.get(event.id)
            if isinstance(event, FINAL):
                self._listeners.pop(event.id, None)
        if listener is not None:
            listener(event)  # type: ignore[arg-type]  # `Begun` is of no interest


class Workers:
    """Worker processes, one for each of `devices`; one that dies is started again, and its orders are made again.

    Without `recipe.threads` they share the cores of this process evenly.
    Raises: SdoptError where a worker cannot begin.
    """

    def __init__(self, recipe: Recipe, devices: Sequence[str], slots: int = SLOTS) -> None:
        count = len(devices)
        self.room = count * (slots + AHEAD)
        if recipe.threads is None:
            recipe = replace(recipe, threads=max(1, usable_cores() // count))
        no_limit: dict[str, Any] = {"queue": 1 << 20, "queue_seconds": 1e9, "stuck_seconds": LONGEST_CALL}
        settings = Settings({NAME: str(recipe.path)}, backend=recipe.backend, slots=slots, **no_limit)
        self._devices = [Device(settings, name, opens=recipe.models, warms=False) for name in devices]
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="sdopt-workers", daemon=True)
        self._thread.start()
        try:
            self._wait(self._start())
        except BaseException:
            self.close()
            raise

    def submit(self, order: Order, listener: Listener) -> None:
        self._events.call_soon_threadsafe(self._submit, order, listener)

    def close(self) -> None:
        self._wait(self._stop())
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()
        self._events.close()

    def _submit(self, order: Order, listener: Listener) -> None:
        min(self._devices, key=lambda device: (device.state != "ready", len(device.orders))).submit(order, listener)

    async def _start(self) -> None:
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*(device.start() for device in self._devices))
        finally:
            if any(device.error or device.problem for device in self._devices):
                watch.cancel()
        for device in self._devices:
            if device.error is not None:
                raise device.error
            if device.problem:
                raise BackendError(device.problem)

    async def _watch(self) -> None:
        """Give a device up whose workers die one after the other before they are ready."""
        while True:
            for device in self._devices:
                if device.failures >= DEATHS and device.state == "restarting":
                    device.give_up(f"{DEATHS} worker processes died one after the other while they started")
            await asyncio.sleep(1.0)

    async def _stop(self) -> None:
        await asyncio.gather(*(device.stop() for device in self._devices))
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def _wait(self, work: Any) -> None:
        """Wait for a coroutine in the thread of the workers; an interrupt of this thread ends the wait."""
        asyncio.run_coroutine_threadsafe(work, self._events).result()


def devices(names: Sequence[str], count: int | None) -> list[str]:
    """The device of each worker: as many as there are names, or `count` that take them in turns."""
    return list(islice(cycle(names or ("",)), count or len(names) or 1))
