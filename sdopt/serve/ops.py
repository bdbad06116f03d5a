"""What operators ask: is it alive, is it ready, how is it.

/health/live     200 while the process runs
/health/ready    200 when every worker has made a warm picture of every bundle; else 503 and why
/metrics         Prometheus
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdopt.serve.context import context_of
from sdopt.serve.metrics import CONTENT_TYPE


async def live(request: Request) -> Response:
    return JSONResponse({"status": "alive"})


async def ready(request: Request) -> Response:
    context = context_of(request)
    devices: list[dict[str, Any]] = [
        {
            "device": member.name or "default",
            "state": member.state,
            "restarts": member.restarts,
            **({"problem": member.problem} if member.problem else {}),
        }
        for device in context.devices
        for member in device.members
    ]
    is_ready = not context.tasks.is_draining and all(device.is_ready for device in context.devices)
    body = {"status": "ready" if is_ready else "not ready", "draining": context.tasks.is_draining, "devices": devices}
    return JSONResponse(body, 200 if is_ready else 503)


async def metrics(request: Request) -> Response:
    context = context_of(request)
    return Response(context.metrics.text(context.devices), headers={"content-type": CONTENT_TYPE})


ROUTES = [
    Route("/health/live", live, methods=["GET"]),
    Route("/health/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
