"""What a task tells its listeners, and what is kept of finished ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sdopt.serve.device import Device
from sdopt.serve.metrics import Metrics
from sdopt.serve.orders import Accepted, Event, Failed, Finished, Moved, Order
from sdopt.serve.replies import HttpError
from sdopt.serve.settings import Settings
from sdopt.serve.tasks import MOST_UNREAD, Tasks, Wish


class Still(Device):
    """A device that keeps what it is given."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, state="ready")
        self.listeners: dict[str, Any] = {}

    def submit(self, order: Order, listener: Any) -> None:
        self.listeners[order.id] = listener

    def cancel(self, id: str) -> None:
        self.listeners[id](Failed(id, "cancelled", "cancelled"))


def make(**settings: Any) -> tuple[Tasks, Still]:
    own = Settings({"emoji": "x"}, **settings)
    device = Still(own)
    return Tasks([device], own, Metrics()), device


def finish(device: Still, id: str, content: bytes = b"x") -> None:
    device.listeners[id](Accepted(id, 1.0, 0, 3, 64, 64))
    device.listeners[id](Finished(id, content, {"seed": 1}, 0.0, 1.0))


def test_who_reads_slowly_misses_steps_and_not_the_picture() -> None:
    async def run() -> list[Event]:
        tasks, device = make()
        task = tasks.create(Wish("emoji", {"seed": 1}))
        events = task.events()
        id = task.pictures[0].order.id
        device.listeners[id](Accepted(id, 1.0, 0, 200, 64, 64))
        seen = [(await anext(events)).event]
        for index in range(200):
            device.listeners[id](Moved(id, index, 200, b"preview"))
        device.listeners[id](Finished(id, b"x", {"seed": 1}, 0.0, 1.0))
        return [*seen, *[one.event async for one in events]]

    seen = asyncio.run(run())
    assert isinstance(seen[0], Accepted)
    assert isinstance(seen[-1], Finished)
    steps = [event.index for event in seen if isinstance(event, Moved)]
    assert len(steps) <= MOST_UNREAD
    assert steps == sorted(steps)


def test_who_comes_late_gets_the_newest_step_and_the_end() -> None:
    async def run() -> list[str]:
        tasks, device = make()
        task = tasks.create(Wish("emoji", {"seed": 1}, 2))
        first, second = (picture.order.id for picture in task.pictures)
        for index in range(3):
            device.listeners[first](Moved(first, index, 3))
        finish(device, second)
        events = task.events()
        seen = [await anext(events) for _ in range(3)]
        finish(device, first)
        seen += [one async for one in events]
        return [f"{one.image}{type(one.event).__name__}" for one in seen]

    assert asyncio.run(run()) == ["0Moved", "1Accepted", "1Finished", "0Accepted", "0Finished"]


def test_finished_tasks_are_forgotten_by_number_and_bytes() -> None:
    async def run() -> None:
        tasks, device = make(keep_jobs=3, keep_bytes=250)
        ids = []
        for number in range(6):
            task = tasks.create(Wish("emoji", {"seed": number}))
            ids.append(task.id)
            finish(device, f"{task.token}-0", b"x" * (100 if number == 5 else 10))
        tasks.create(Wish("emoji", {"seed": 9}))
        assert [tasks.get("", id) is not None for id in ids] == [False, False, False, True, True, True]
        for _ in range(2):
            task = tasks.create(Wish("emoji", {"seed": 1}))
            finish(device, f"{task.token}-0", b"x" * 100)
        tasks.create(Wish("emoji", {"seed": 9}))
        assert sum(task.bytes for task in tasks.all) <= 250

    asyncio.run(run())


def test_one_failure_ends_the_others() -> None:
    async def run() -> None:
        tasks, device = make()
        task = tasks.create(Wish("emoji", {"seed": 1}, 3))
        id = task.pictures[1].order.id
        device.listeners[id](Failed(id, "usage", "wrong", "seed"))
        assert task.is_final
        assert task.status == "failed"
        assert task.failure is not None
        assert task.failure.param == "seed"

    asyncio.run(run())


def test_seeds_end_at_64_bits_and_ids_are_there_once() -> None:
    async def run() -> None:
        tasks, _ = make()
        with pytest.raises(HttpError, match="seed"):
            tasks.create(Wish("emoji", {"seed": 2**64 - 1}, 2))
        tasks.create(Wish("emoji", {"seed": 2**64 - 2}, 1), "mine")
        with pytest.raises(HttpError, match="mine"):
            tasks.create(Wish("emoji", {"seed": 1}), "mine")
        tasks.is_draining = True
        with pytest.raises(HttpError, match="stopping"):
            tasks.create(Wish("emoji", {"seed": 1}))

    asyncio.run(run())
