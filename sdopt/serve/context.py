"""What every route is given: settings, tasks, devices, and who is calling."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any, cast

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from sdopt.request.keyword import Keyword
from sdopt.serve.desk import Desk
from sdopt.serve.fields import from_form
from sdopt.serve.metrics import Metrics
from sdopt.serve.replies import HttpError
from sdopt.serve.settings import Settings
from sdopt.serve.tasks import Tasks

MOST_VALUES = 100_000  # of JSON in one body; a picture is one
DEEPEST = 32  # lists and objects in each other
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(eq=False)
class Context:
    """One server."""

    settings: Settings
    devices: Sequence[Desk]
    metrics: Metrics
    tasks: Tasks

    @property
    def models(self) -> dict[str, Any]:
        """What is known of each bundle, by name: see `sdopt.serve.models.Model.describe`."""
        known = {name: model for device in self.devices for name, model in device.models.items()}
        return {name: known[name] for name in self.settings.bundles if name in known}

    def model(self, name: str | None) -> str:
        """The name of a served bundle; the first one where none is given. Raises: HttpError 404."""
        if not self.models or (name in self.settings.bundles and name not in self.models):
            raise HttpError(503, "the server is starting; try again", None, "starting", 2.0)
        if name is None or name == "":
            return next(iter(self.models))
        if name not in self.models:
            text = f"The model {name!r} does not exist; there are {', '.join(self.models)}"
            raise HttpError(404, text, "model", "model_not_found")
        return name


def context_of(request: Request) -> Context:
    return cast(Context, request.app.state.context)


def caller_of(request: Request) -> str:
    """Who calls: the name of his key, or the address that he calls from."""
    return cast(str, request.state.caller)


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object in a request. Raises: HttpError 400, 413, 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json":
        raise HttpError(415, f"content-type is {kind}; allowed is application/json")
    content = await request.body()
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MOST_VALUES:
        raise HttpError(413, f"the body has more than {MOST_VALUES} values", None, "too_large")
    try:
        text = content.decode("utf-8")
        body = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        _refuse_deep(body)
        if "\\u" in text:  # half of a pair can be written so, which is no Unicode
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is no JSON: {error}", None, "invalid_json") from error
    if not isinstance(body, dict):
        raise HttpError(400, 'the body is no JSON object; send {"prompt": "a red apple"}', None, "invalid_json")
    return cast("dict[str, Any]", body)


def _finite(text: str) -> float:
    """Raises: ValueError for a number that is none of JSON's, such as 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _refuse_deep(body: Any) -> None:
    """Raises: ValueError for lists and objects that are nested too deep."""
    level = [body]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in cast("list[Any]", list(outer.values()) if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} times")


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


async def form_body(request: Request, own: Mapping[str, Keyword]) -> dict[str, Any]:
    """The fields of a form, with its files as bytes. Raises: HttpError 400, 413, 415."""
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind, charset = header.get_content_type(), header.get_param("charset", "utf-8")
    if kind != "multipart/form-data" or not request.headers.get("content-type"):
        raise HttpError(415, f"content-type is {kind or 'missing'}; allowed is multipart/form-data")
    if str(charset).lower().replace("-", "") != "utf8":
        raise HttpError(415, "the charset of a form is utf-8; leave it out")
    most = context_of(request).settings.max_body
    async with request.form(max_files=32, max_fields=200, max_part_size=most) as form:
        fields: list[tuple[str, Any]] = []
        for name, value in form.multi_items():
            fields.append((name, await value.read() if isinstance(value, UploadFile) else value))
    return from_form(fields, own)
