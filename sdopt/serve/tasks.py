"""Tasks: what one HTTP request wants, which is one picture or several, each an order of its own.

    task = tasks.create(wish)              # orders are sent to the device with the least work
    await task.settled()                   # all pictures are there, or one failed
    async for event in task.events():      # from the beginning, for anybody who listens

Finished tasks are kept by number, bytes and age, so that a client that went away finds its pictures.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdopt.serve.desk import Desk
from sdopt.serve.metrics import Metrics
from sdopt.serve.orders import PLAIN, Accepted, Encoding, Event, Failed, Finished, Moved, Order, Weight
from sdopt.serve.replies import HttpError
from sdopt.serve.settings import Settings

LARGEST_SEED = 2**64
MOST_UNREAD = 16  # events of one listener, beyond which steps are left out
Status = str  # queued, running, completed, failed, cancelled


@dataclass(frozen=True)
class Wish:
    """What a request wants: keywords of one image, and `number` images, whose seeds follow each other.

    `kind`: the word for events, e.g. "image_generation". `seconds`, `previews`, `alone`: see `Order`.
    """

    bundle: str
    options: Mapping[str, Any]
    number: int = 1
    loras: Mapping[str, Weight] = field(default_factory=dict[str, Weight])
    caller: str = ""
    encoding: Encoding = PLAIN
    previews: int = 0
    seconds: float | None = None
    alone: bool = False


@dataclass(eq=False)
class Picture:
    """One picture of a task, on its way. `index`, `of`: calls of the UNet."""

    order: Order
    device: Desk
    is_accepted: bool = False
    index: int = 0
    of: int = 0
    width: int = 0
    height: int = 0
    seconds: float = 0.0  # until it is done, as was estimated
    ahead: int = 0
    preview: bytes | None = None
    finished: Finished | None = None
    failed: Failed | None = None

    @property
    def is_final(self) -> bool:
        return self.finished is not None or self.failed is not None


@dataclass(frozen=True)
class TaskEvent:
    """What happened to picture number `image` of a task."""

    image: int
    event: Event


class Task:
    """The pictures of one request."""

    def __init__(self, id: str, wish: Wish) -> None:
        self.id, self.wish, self.token = id, wish, secrets.token_hex(8)
        self.created, self.ended = time.time(), 0.0
        self.pictures: list[Picture] = []
        self._history: list[TaskEvent] = []
        self._listeners: list[_Listener] = []
        self._changed = asyncio.Event()

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen."""
        return all(picture.is_final for picture in self.pictures)

    @property
    def is_accepted(self) -> bool:
        """Whether every picture is in a queue, or is done."""
        return all(picture.is_accepted or picture.is_final for picture in self.pictures)

    @property
    def failure(self) -> Failed | None:
        """The first failure of a picture, one that is no cancelling before one that is."""
        failures = [picture.failed for picture in self.pictures if picture.failed is not None]
        return next((f for f in failures if f.reason != "cancelled"), failures[0] if failures else None)

    @property
    def status(self) -> Status:
        failure = self.failure
        if failure is not None and self.is_final:
            return "cancelled" if failure.reason == "cancelled" else "failed"
        if self.is_final:
            return "completed"
        return "running" if any(picture.index or picture.is_final for picture in self.pictures) else "queued"

    @property
    def bytes(self) -> int:
        """The memory of its pictures."""
        return sum(len(picture.finished.content) for picture in self.pictures if picture.finished is not None)

    def add(self, image: int, event: Event) -> None:
        """Take in an event of one of its pictures."""
        picture = self.pictures[image]
        if isinstance(event, Accepted):
            picture.is_accepted, picture.of, picture.seconds = True, event.calls, event.seconds
            picture.width, picture.height, picture.ahead = event.width, event.height, event.ahead
        elif isinstance(event, Moved):
            picture.index, picture.of, picture.preview = event.index + 1, event.of, event.preview or picture.preview
        elif isinstance(event, Finished):
            picture.finished, picture.preview = event, None
        else:
            picture.failed, picture.preview = event, None
        self._history = [
            one for one in self._history if not (one.image == image and isinstance(one.event, Moved))
        ]  # of the way, the newest is enough for whoever comes later
        self._history.append(TaskEvent(image, event))
        for listener in self._listeners:
            listener.add(TaskEvent(image, event))
        if self.is_final:
            self.ended = time.time()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def settled(self) -> None:
        """Wait until nothing more will happen."""
        while not self.is_final:
            await self._changed.wait()

    async def accepted(self) -> None:
        """Wait until every picture is in a queue, or was refused."""
        while not self.is_accepted:
            await self._changed.wait()

    async def events(self) -> AsyncIterator[TaskEvent]:
        """What happened so far, of the steps the newest alone, and what happens from now on."""
        listener = _Listener(self._history)
        self._listeners.append(listener)
        left = len(self.pictures)
        try:
            while left:
                one = await listener.next()
                left -= isinstance(one.event, (Finished, Failed))
                yield one
        finally:
            self._listeners.remove(listener)


class _Listener:
    """Events that somebody has not read yet. Who reads slowly misses steps, so that few previews are in memory."""

    def __init__(self, history: Sequence[TaskEvent]) -> None:
        self._events, self._some = list(history), asyncio.Event()

    def add(self, one: TaskEvent) -> None:
        if len(self._events) >= MOST_UNREAD:
            self._events = [o for o in self._events if o.image != one.image or not isinstance(o.event, Moved)]
        self._events.append(one)
        self._some.set()

    async def next(self) -> TaskEvent:
        while not self._events:
            self._some.clear()
            await self._some.wait()
        return self._events.pop(0)


class Tasks:
    """All tasks that are not forgotten, by id."""

    def __init__(self, devices: Sequence[Desk], settings: Settings, metrics: Metrics) -> None:
        self._devices, self._settings, self._metrics = devices, settings, metrics
        self._tasks: dict[tuple[str, str], Task] = {}  # by the owner of the key, and the id that he gave
        self.is_draining = False

    def create(self, wish: Wish, id: str | None = None) -> Task:
        """A task whose orders are sent. Raises: HttpError where its id is taken, or nothing is made any more."""
        if self.is_draining:
            raise HttpError(503, "the server is stopping; send it again", None, "stopping", 5.0)
        owner = wish.caller.partition("/")[0]
        if id is not None and (owner, id) in self._tasks:
            raise HttpError(409, f"there is a job {id} already; choose another id", "id", "conflict")
        self._forget_old()
        task = Task(id or secrets.token_hex(12), wish)
        first = wish.options.get("seed")
        first = secrets.randbits(32) if first is None else int(first)
        if first + wish.number > LARGEST_SEED:
            raise HttpError(400, f"seed = {first}; the last of {wish.number} pictures would be beyond 2**64", "seed")
        self._tasks[owner, task.id] = task
        orders = [self._order(task, i, first + i) for i in range(wish.number)]
        for order in orders:
            devices = [device for device in self._devices if device.serves(wish.bundle)]
            task.pictures.append(Picture(order, min(devices, key=_load)))
        for i, picture in enumerate(task.pictures):
            picture.device.submit(picture.order, lambda event, i=i: self._take(task, i, event))
        return task

    def get(self, owner: str, id: str) -> Task | None:
        """The task of this id that was made with the owner's key."""
        return self._tasks.get((owner, id))

    @property
    def all(self) -> list[Task]:
        """All of them, the newest last."""
        return list(self._tasks.values())

    def cancel(self, task: Task) -> None:
        """Stop what is not done of a task."""
        for picture in task.pictures:
            if not picture.is_final:
                picture.device.cancel(picture.order.id)

    def forget(self, task: Task) -> None:
        """Free the memory of a task's pictures, when it is done."""
        if task.is_final:
            self._tasks.pop((task.wish.caller.partition("/")[0], task.id), None)

    def _order(self, task: Task, index: int, seed: int) -> Order:
        wish = task.wish
        options = {**wish.options, "seed": seed}
        return Order(
            f"{task.token}-{index}", wish.bundle, options, wish.loras, wish.caller, wish.encoding, wish.previews,
            wish.seconds, wish.alone,
        )  # fmt: skip

    def _take(self, task: Task, image: int, event: Event) -> None:
        self._metrics.event(task.wish.bundle, event)
        task.add(image, event)
        if isinstance(event, Failed) and event.reason != "cancelled":  # the others are of no use alone
            self.cancel(task)

    def _forget_old(self) -> None:
        """Forget finished tasks, the oldest first, until those that are kept are within the limits."""
        settings, now = self._settings, time.time()
        done = [task for task in self._tasks.values() if task.is_final]
        count, total = len(done), sum(task.bytes for task in done)
        for task in done:
            is_old = now - task.ended > settings.keep_seconds
            if not is_old and count <= settings.keep_jobs and total <= settings.keep_bytes:
                return
            self.forget(task)
            count, total = count - 1, total - task.bytes


def _load(device: Desk) -> tuple[bool, float]:
    """How much a device has to do, compared with others."""
    return not device.is_ready, device.seconds + len(device.orders)
