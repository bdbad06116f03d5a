"""Jobs: pictures that are made whether or not the client stays.

    POST   /v1/jobs                   the fields of /v1/images/generations, and any keyword; answers 202 at once
    GET    /v1/jobs                   the caller's jobs
    GET    /v1/jobs/ID                how far it is; with its pictures when it is done
    GET    /v1/jobs/ID/events         the same as server-sent events, from the beginning
    GET    /v1/jobs/ID/images/0       one picture, as a file
    POST   /v1/jobs/ID/cancel         stop at the next step
    DELETE /v1/jobs/ID                stop, and forget

A job belongs to the key that made it. Finished jobs are forgotten by number, bytes and age (see `Settings`).
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sdopt.errors import shown
from sdopt.request.keyword import Keyword
from sdopt.request.kinds import Choice
from sdopt.serve.context import Context, caller_of, context_of, json_body
from sdopt.serve.kinds import Either, Matching
from sdopt.serve.openai import FORMATS, as_sent, read, wish_of
from sdopt.serve.openai import OWN as GENERATION
from sdopt.serve.orders import EVERY_STEP, Failed, Finished, Moved
from sdopt.serve.replies import HttpError
from sdopt.serve.sse import HEADERS, PING, events_or_pings
from sdopt.serve.tasks import Picture, Task, TaskEvent

MEDIA = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
ALL = "all"  # of partial_images: one for each step
PREVIEWS = GENERATION["partial_images"]
OWN = {  # beside those of /v1/images/generations
    "id": Keyword(
        "the job's own", Matching("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", "up to 64 letters, digits, '-' and '_'"),
        None, "drawn",
    ),
    "partial_images": Keyword(
        "previews of each picture; all: one a step", Either(PREVIEWS.kind, Choice((ALL,), '"all"')), PREVIEWS.default
    ),
}  # fmt: skip


async def submit(request: Request) -> Response:
    body, context = await json_body(request), context_of(request)
    own = read(body, OWN)
    id, every = body.pop("id", None), own["partial_images"] == ALL
    if "stream" in body:
        raise HttpError(400, "stream: read the job's events at /v1/jobs/ID/events", "stream", "invalid_value")
    fields = {**body, "partial_images": 0} if every else body
    wish = await asyncio.to_thread(wish_of, context, fields, caller_of(request))
    task = context.tasks.create(replace(wish, previews=EVERY_STEP) if every else wish, id)
    await task.accepted()
    failure = task.failure
    if failure is not None:
        context.tasks.cancel(task)
        await task.settled()
        context.tasks.forget(task)
        raise as_sent(HttpError.of(failure), body)
    return JSONResponse(describe(context, task), 202, {"location": f"/v1/jobs/{task.id}"})


async def jobs(request: Request) -> Response:
    context, own = context_of(request), caller_of(request)
    found = [task for task in context.tasks.all if belongs(task, own)]
    return JSONResponse({"object": "list", "data": [describe(context, task, content=False) for task in found]})


async def job(request: Request) -> Response:
    return JSONResponse(describe(context_of(request), _task(request)))


async def cancel(request: Request) -> Response:
    context, task = context_of(request), _task(request)
    context.tasks.cancel(task)
    await task.settled()
    return JSONResponse(describe(context, task))


async def delete(request: Request) -> Response:
    context, task = context_of(request), _task(request)
    context.tasks.cancel(task)
    await task.settled()
    context.tasks.forget(task)
    return Response(status_code=204)


async def image(request: Request) -> Response:
    task, text = _task(request), request.path_params["index"]
    index = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else len(task.pictures)
    if index >= len(task.pictures):
        raise HttpError(404, f"job {task.id} has pictures 0 to {len(task.pictures) - 1}", "index", "not_found")
    finished = task.pictures[index].finished
    if finished is None:
        raise HttpError(
            409, f"picture {index} of job {task.id} is {_status(task.pictures[index])}", "index", "conflict"
        )
    name = task.wish.encoding.format.lower()
    headers = {"content-disposition": f'inline; filename="{task.id}-{index}.{name}"', "cache-control": "private"}
    return Response(finished.content, media_type=MEDIA[task.wish.encoding.format], headers=headers)


async def events(request: Request) -> Response:
    context, task = context_of(request), _task(request)
    return StreamingResponse(_events(context, task), media_type="text/event-stream", headers=HEADERS)


async def _events(context: Context, task: Task) -> AsyncIterator[bytes]:
    """Every event as `event: progress|completed|failed` and JSON; `: ping` where nothing happens for a while."""
    yield _line("job", describe(context, task, content=False))
    async for one in events_or_pings(task, context.settings.ping_seconds):
        yield PING if one is None else _told(context, task, one)
    yield _line("done", describe(context, task, content=False))


def _told(context: Context, task: Task, one: TaskEvent) -> bytes:
    event, own = one.event, {"image_index": one.image}
    if isinstance(event, Finished):
        content = base64.b64encode(event.content).decode()
        return _line("completed", {**own, "b64_json": content, "parameters": event.parameters})
    if isinstance(event, Failed):
        return _line("failed", {**own, "reason": event.reason, **HttpError.of(event).body})
    if isinstance(event, Moved):
        preview = None if event.preview is None else base64.b64encode(event.preview).decode()
        return _line("progress", {**own, "index": event.index, "of": event.of, "b64_json": preview})
    return _line("accepted", {**own, "position": position(context, task), "seconds": event.seconds, "of": event.calls})


def _line(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _task(request: Request) -> Task:
    """The caller's job of this id. Raises: HttpError 404 for one that is not there, or not his."""
    id = request.path_params["id"]
    task = context_of(request).tasks.get(caller_of(request), id)
    if task is None:
        raise HttpError(
            404, f"there is no job {shown(id)}; finished jobs are forgotten after a while", "id", "not_found"
        )
    return task


def belongs(task: Task, caller: str) -> bool:
    """Whether a task was made with this caller's key."""
    return task.wish.caller.partition("/")[0] == caller


def position(context: Context, task: Task) -> int:
    """How many tasks that are not done came before."""
    before = 0
    for other in context.tasks.all:
        if other is task:
            return before
        before += not other.is_final
    return before


def describe(context: Context, task: Task, content: bool = True) -> dict[str, Any]:
    """A job as JSON; `content`: with its pictures."""
    failure, status = task.failure, task.status
    return {
        "id": task.id,
        "object": "job",
        "status": status,
        "model": task.wish.bundle,
        "created": int(task.created),
        "ended": int(task.ended) if task.is_final else None,
        "position": position(context, task) if status == "queued" else None,
        "output_format": next(word for word, name in FORMATS.items() if name == task.wish.encoding.format),
        "data": [_described(one, content) for one in task.pictures],
        "error": HttpError.of(failure).body["error"] if failure is not None and task.is_final else None,
    }


def _described(picture: Picture, content: bool) -> dict[str, Any]:
    finished = picture.finished
    encoded = base64.b64encode(finished.content).decode() if finished is not None and content else None
    return {
        "status": _status(picture),
        "index": picture.index,
        "of": picture.of,
        "seed": picture.order.options["seed"],
        "width": picture.width,
        "height": picture.height,
        "b64_json": encoded,
        "parameters": finished.parameters if finished is not None else None,
    }


def _status(picture: Picture) -> str:
    if picture.finished is not None:
        return "completed"
    if picture.failed is not None:
        return "cancelled" if picture.failed.reason == "cancelled" else "failed"
    return "running" if picture.index else "queued"


ROUTES = [
    Route("/v1/jobs", submit, methods=["POST"]),
    Route("/v1/jobs", jobs, methods=["GET"]),
    Route("/v1/jobs/{id}", job, methods=["GET"]),
    Route("/v1/jobs/{id}", delete, methods=["DELETE"]),
    Route("/v1/jobs/{id}/events", events, methods=["GET"]),
    Route("/v1/jobs/{id}/cancel", cancel, methods=["POST"]),
    Route("/v1/jobs/{id}/images/{index}", image, methods=["GET"]),
]
