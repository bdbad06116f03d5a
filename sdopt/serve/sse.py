"""Server-sent events: what happens to a task, as lines of text, and pings where nothing happens for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from sdopt.serve.tasks import Task, TaskEvent

PING = b": ping\n\n"  # a comment, which clients skip and proxies count
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def events_or_pings(task: Task, seconds: float) -> AsyncIterator[TaskEvent | None]:
    """The events of a task; None where so many seconds brought none."""
    source: AsyncIterator[TaskEvent] = task.events().__aiter__()
    waiting: asyncio.Future[TaskEvent] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(source.__anext__())
            done, _ = await asyncio.wait([waiting], timeout=seconds)
            if not done:
                yield None
                continue
            try:
                one = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield one
    finally:
        if waiting is not None:
            waiting.cancel()
