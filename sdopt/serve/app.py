"""The server as an ASGI application, and how it runs: workers start, requests come, SIGTERM drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sdopt.errors import BackendError, SdoptError, UsageError
from sdopt.logs import logger
from sdopt.serve import jobs, openai, openapi, ops, page, sdapi, sdapi_lists
from sdopt.serve.auth import Keys
from sdopt.serve.context import Context
from sdopt.serve.desk import Desk
from sdopt.serve.device import Device
from sdopt.serve.gate import Gate
from sdopt.serve.metrics import Metrics
from sdopt.serve.replies import HttpError
from sdopt.serve.settings import Settings
from sdopt.serve.tasks import Tasks

log = logger(__name__)
ROUTES = [
    *openai.ROUTES,
    *jobs.ROUTES,
    *sdapi.ROUTES,
    *sdapi_lists.ROUTES,
    *openapi.ROUTES,
    *ops.ROUTES,
    *page.ROUTES,
]


def make_app(
    settings: Settings,
    devices: Sequence[Desk] | None = None,
    unable: Callable[[SdoptError], None] | None = None,
    ready: Callable[[], None] | None = None,
) -> Any:
    """The application. Its workers start and stop with its lifespan; `devices`: others than the settings name.

    `unable` is called with what a worker says that can never begin, and `ready` when all take requests.
    """
    keys, metrics = Keys.read(settings.api_key_file), Metrics()
    own: list[Desk] = [Device(settings, name) for name in settings.devices] if devices is None else list(devices)
    context = Context(settings, own, metrics, Tasks(own, settings, metrics))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        starting = [asyncio.create_task(_started(own, unable, ready))]
        try:
            yield
        finally:
            context.tasks.is_draining = True
            for one in starting:
                one.cancel()
            # every connection has ended by now, so that nobody could fetch what is still made
            await asyncio.gather(*(device.stop() for device in own))

    handlers: Any = {
        HttpError: _told,
        UsageError: _usage,
        HTTPException: _of_starlette,
        ClientDisconnect: _gone,
        Exception: _fault,
    }
    app = Starlette(routes=ROUTES, lifespan=lifespan, exception_handlers=handlers)
    app.state.context = context
    return Gate(app, settings, keys, metrics)


async def _started(
    devices: Sequence[Desk], unable: Callable[[SdoptError], None] | None, ready: Callable[[], None] | None
) -> None:
    await asyncio.gather(*(device.start() for device in devices))
    error = next((device.error for device in devices if device.error is not None), None)
    if error is not None and unable is not None:
        unable(error)
    elif error is None and ready is not None:
        ready()


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response(request.url.path)


async def _usage(request: Request, error: Exception) -> Response:
    """What a route was given and could not read."""
    assert isinstance(error, UsageError)
    return HttpError(400, str(error), error.param, "invalid_value").response(request.url.path)


async def _of_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
    return HttpError(error.status_code, texts.get(error.status_code, error.detail)).response(request.url.path)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _fault(request: Request, error: Exception) -> Response:
    log.error("request %s: a fault of sdopt", request.state.request_id, exc_info=error)
    told = HttpError(500, "a fault of sdopt; the server's log has the traceback of this request")
    return told.response(request.url.path)


class _Server(uvicorn.Server):
    """Uvicorn, which ends at once on the second signal, whichever it is."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.force_exit or self.should_exit
        super().handle_exit(sig, frame)


def serve(settings: Settings, ready: Callable[[], None], devices: Sequence[Desk] | None = None) -> int:
    """Run until a signal ends it. Returns the exit code. `ready` is called when all workers take requests.

    `devices`: others than the settings name.

    Raises: what a worker says that can never begin; BackendError where the address is taken.
    """
    problems: list[SdoptError] = []

    def unable(problem: SdoptError) -> None:
        problems.append(problem)
        server.should_exit = True

    config = uvicorn.Config(
        make_app(settings, devices, unable, ready), host=settings.host, port=settings.port, lifespan="on",
        log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=int(settings.drain_seconds),
    )  # fmt: skip
    server = _Server(config)
    try:
        sock = config.bind_socket()  # before a worker starts
    except SystemExit as ended:  # uvicorn has said why
        raise BackendError(f"http://{settings.host}:{settings.port} cannot be served; choose another --port") from ended
    try:
        server.run([sock])
    except KeyboardInterrupt:  # uvicorn raises the signal again that it has obeyed
        log.info("ended by a signal")
    if problems:
        raise problems[0]
    return 0
