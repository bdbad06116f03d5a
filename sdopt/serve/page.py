"""The page at /, and what it makes its controls from.

    GET /               page.html: one file, without anything from another address
    GET /v1/keywords    every keyword that a request may have, with the samplers, the schedules and the server's limits

The page may load nothing, run no script but its own, and talk to this server alone (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdopt.request.keywords import describe
from sdopt.samplers import SAMPLERS
from sdopt.samplers.registry import SCHEDULES
from sdopt.serve.context import context_of
from sdopt.serve.fields import NOT_SENT

FILE = Path(__file__).with_name("page.html")
INLINE = re.compile(r"<(?P<tag>script|style)>(?P<text>.*?)</(?P=tag)>", re.DOTALL)
LIMITS = ("max_body", "max_pixels", "max_prompt_bytes", "max_steps", "max_images", "keep_seconds")


@cache
def content() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. The policy names its script and its style by their hashes."""
    text = FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        **{f"{tag}-src": sources for tag, sources in _hashes(text).items()},
    }
    page = text.encode()
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(page).hexdigest()[:32]}"',
    }
    return page, headers


def _hashes(text: str) -> dict[str, str]:
    """The sources of "script" and "style" that a policy allows: the hash of each one in the page."""
    found: dict[str, list[str]] = {"script": [], "style": []}
    for match in INLINE.finditer(text):
        digest = hashlib.sha256(match["text"].encode()).digest()
        found[match["tag"]].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    return {tag: " ".join(hashes) for tag, hashes in found.items()}


async def page(request: Request) -> Response:
    body, headers = content()
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="text/html; charset=utf-8", headers=headers)


async def keywords(request: Request) -> Response:
    settings = context_of(request).settings
    sent = [one for one in describe() if one["name"] not in NOT_SENT and one.get("type") != "tensor"]
    samplers: list[dict[str, Any]] = [
        {"name": one.name, "title": one.title, "family": one.family, "diffusers": one.diffusers}
        for one in SAMPLERS.values()
    ]
    limits = {name: getattr(settings, name) for name in LIMITS}
    body = {"object": "list", "data": sent, "samplers": samplers, "schedules": SCHEDULES}
    return JSONResponse({**body, "limits": limits})


ROUTES = [
    Route("/", page, methods=["GET"]),
    Route("/v1/keywords", keywords, methods=["GET"]),
]
