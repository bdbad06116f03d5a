"""A request ends when its client goes away: whoever waits for a picture stops waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

Answer = TypeVar("Answer")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What `work` gives. Raises: ClientDisconnect as soon as the client has closed the connection."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client closes the connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
