"""What every request passes: its id, its origin, its key, the size of its body; and one line in the log.

Pure ASGI, so that a route still sees when its client goes away.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdopt.serve.auth import Keys
from sdopt.serve.metrics import Metrics
from sdopt.serve.replies import HttpError
from sdopt.serve.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
OPEN = ("/", "/health/live", "/health/ready")  # without a key
LOCAL = ("localhost", "127.0.0.1", "::1")
BODY_SECONDS = 30.0  # between two pieces of a body
log = logging.getLogger("sdopt.serve.access")


class Gate:
    """Wraps the routes."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        self._app, self._settings, self._keys, self._metrics = app, settings, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:  # one that is there twice is both, and so none that is allowed
            key, text = name.decode("latin-1"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        given = headers.get("x-request-id", "")
        id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state, began = scope.setdefault("state", {}), time.monotonic()
        answer = _Answer(send, id, self._cors(headers))
        try:
            state["request_id"] = id
            state["caller"] = self._admitted(scope, headers)
            if scope["method"] == "OPTIONS" and answer.cors and "access-control-request-method" in headers:
                await answer.preflight()
            else:
                limited = _Limited(receive, headers, self._settings.max_body, answer)
                await self._app(scope, limited, answer)
        except HttpError as error:
            if not answer.status:
                await error.response(scope["path"])(scope, receive, answer)
        finally:
            self._log(scope, state, answer, time.monotonic() - began)

    def _admitted(self, scope: Scope, headers: dict[str, str]) -> str:
        """The name of the caller. Raises: HttpError 401, 403."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._keys.hashes and self._settings.is_local and _name(host) not in LOCAL:
            raise HttpError(403, f"host {host!r}: without keys this server answers only to localhost", None, "host")
        if not self._keys.hashes and self._settings.is_local and not _is_here(scope.get("client")):
            # behind a proxy of Ray, which may listen at every address
            text = "without keys this server answers only to callers of its own machine; give it an api_key_file"
            raise HttpError(403, text, None, "host")
        if origin and origin not in self._settings.cors and (not host or _netloc(origin) != host):
            text = f"origin {origin[:200]}: pages of other sites may not use this server; sdopt serve --cors ORIGIN"
            raise HttpError(403, text, None, "origin")
        if not self._keys.hashes:
            client = scope.get("client")
            return str(client[0]) if client else "local"
        if scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return ""
        owner = self._keys.owner(headers.get("authorization", ""))
        if owner is None:
            raise HttpError(401, "the key is missing or wrong; send Authorization: Bearer KEY", None, "invalid_api_key")
        return owner

    def _cors(self, headers: dict[str, str]) -> str:
        origin = headers.get("origin", "")
        return origin if origin in self._settings.cors else ""

    def _log(self, scope: Scope, state: dict[str, Any], answer: _Answer, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._metrics.requests.labels(path, scope["method"], str(answer.status or 499)).inc()
        line = {
            "request_id": state["request_id"],
            "caller": state.get("caller"),
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": answer.status or 499,
            "seconds": round(seconds, 4),
        }
        log.info("%s", json.dumps(line))


def _netloc(origin: str) -> str:
    """The host and port of an Origin header; empty where it has none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _is_here(client: Any) -> bool:
    """Whether a connection comes from this machine; one without an address does."""
    try:
        return client is None or ipaddress.ip_address(str(client[0])).is_loopback
    except ValueError:  # a name, which no connection over a network has
        return True


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class _Answer:
    """Sends on, with the request's id; knows the status that was sent, 0 before."""

    def __init__(self, send: Send, id: str, cors: str) -> None:
        self._send, self._id, self.cors, self.status = send, id, cors, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self._id.encode()), (b"x-content-type-options", b"nosniff")]
            if self.cors:
                own += [(b"access-control-allow-origin", self.cors.encode()), (b"vary", b"origin")]
                own += [(b"access-control-expose-headers", b"x-request-id, retry-after, retry-after-ms, location")]
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._send(message)

    async def preflight(self) -> None:
        headers = [
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
            (b"access-control-max-age", b"600"),
        ]
        await self({"type": "http.response.start", "status": 204, "headers": headers})
        await self({"type": "http.response.body", "body": b""})


class _Limited:
    """Receives a body up to so many bytes, whose pieces come in time."""

    def __init__(self, receive: Receive, headers: dict[str, str], most: int, answer: _Answer) -> None:
        self._receive, self._most, self._bytes, self._is_whole = receive, most, 0, False
        self._answer = answer
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:18]) > most:
            raise HttpError(413, f"the body has {length} bytes; allowed are {most}", None, "too_large")

    async def __call__(self) -> Message:
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), BODY_SECONDS)
        except (asyncio.TimeoutError, TimeoutError) as error:
            if self._answer.status:  # it is being sent, and only the end of the connection is waited for
                return await self._receive()
            raise HttpError(408, f"nothing came of the body for {BODY_SECONDS:.0f} s", None, "timeout") from error
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._bytes > self._most:
                raise HttpError(413, f"the body has more than {self._most} bytes", None, "too_large")
        return message
