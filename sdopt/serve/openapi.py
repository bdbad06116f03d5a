"""The OpenAPI document of all routes, at /openapi.json. Each field comes from the place where it is declared.

    keywords of a picture     sdopt.request.keywords
    OpenAI's fields           sdopt.serve.openai.OWN, FILES; jobs: sdopt.serve.jobs.OWN
    AUTOMATIC1111's fields    sdopt.serve.sdapi_fields, sdapi_lists
    paths and methods         ROUTES of each module

`OPERATIONS` says what stands nowhere else: a sentence for each route, and what it answers.
Ref: OpenAPI Specification 3.1.1, https://spec.openapis.org/oas/v3.1.1.html.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from sdopt import __version__
from sdopt.dataclass import dataclass
from sdopt.request.keyword import Keyword
from sdopt.request.keywords import KEYWORDS
from sdopt.serve import jobs, openai, sdapi, sdapi_lists
from sdopt.serve.fields import is_sent
from sdopt.serve.openapi_answers import ANSWERS, answer
from sdopt.serve.replies import WEB_UI
from sdopt.serve.sdapi_fields import IMG2IMG, SETTINGS, TXT2IMG

Schema = dict[str, Any]
Fields = Mapping[str, Keyword]
APIS = ("/v1/", "/health/", "/metrics", WEB_UI, "/openapi.json")  # how the paths of the document begin
KEYWORD_FIELDS: Fields = {name: keyword for name, keyword in KEYWORDS.items() if is_sent(name, keyword)}
GENERATION: Fields = {**KEYWORD_FIELDS, **openai.OWN}
EDIT: Fields = {**GENERATION, **openai.FILES}
ERRORS = {
    400: "a field is wrong",
    401: "the key is missing or wrong",
    403: "this host or page may not call",
    404: "it is not there",
    408: "the body did not come in time",
    409: "it is in the way of something, or was cancelled",
    413: "the body is too large",
    415: "the content type is another one",
    422: "a field is wrong, or not there",
    429: "the queue is full",
    500: "a picture failed",
    503: "the server is starting or stopping",
}
SCHEMES = {"key": "bearer", "login": "basic"}  # how a key is sent
READING = (401, 403, 404)  # without a body
COMMON = (*READING, 408, 409, 413, 415, 429, 500, 503)


@dataclass(frozen=True)
class Operation:
    """One method of one path. `answers`: names in ANSWERS; `status`: of a success, and of others that are none."""

    summary: str
    answers: tuple[str, ...]
    status: tuple[int, ...] = (200,)
    fields: Fields = field(default_factory=dict[str, Keyword])
    required: tuple[str, ...] = ()
    is_form: bool = False
    may_be_empty: bool = False  # the body
    query: Fields = field(default_factory=dict[str, Keyword])


def _list(summary: str, name: str = "list") -> Operation:
    return Operation(summary, (name,))


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/images/generations"): Operation(
        "Pictures from a text", ("images", "events"), fields=GENERATION, required=("prompt",)
    ),
    ("POST", "/v1/images/edits"): Operation(
        "Pictures from a picture, or of the part under a mask", ("images", "events"), fields=EDIT,
        required=("prompt", "image"), is_form=True,
    ),
    ("POST", "/v1/images/variations"): Operation(
        "Pictures from a picture, without a text", ("images", "events"), fields=EDIT, required=("image",), is_form=True
    ),
    ("GET", "/v1/models"): _list("The bundles that are served", "models"),
    ("GET", "/v1/models/{name}"): _list("One of them", "model"),
    ("GET", "/v1/keywords"): _list("Every keyword that a request may have, and the limits", "keywords"),
    ("POST", "/v1/jobs"): Operation(
        "Pictures that are made whether or not the client stays", ("job",), (202,), {**GENERATION, **jobs.OWN},
        required=("prompt",),
    ),
    ("GET", "/v1/jobs"): _list("The caller's jobs", "jobs"),
    ("GET", "/v1/jobs/{id}"): _list("How far a job is, and its pictures", "job"),
    ("DELETE", "/v1/jobs/{id}"): Operation("Stop a job, and forget it", (), (204,)),
    ("GET", "/v1/jobs/{id}/events"): _list("What happens to a job, from the beginning", "events"),
    ("POST", "/v1/jobs/{id}/cancel"): _list("Stop a job at its next step", "job"),
    ("GET", "/v1/jobs/{id}/images/{index}"): _list("One picture, as a file", "picture"),
    ("GET", "/health/live"): _list("200 while the process runs", "health"),
    ("GET", "/health/ready"): Operation("Whether it takes requests", ("health",), (200, 503)),
    ("GET", "/metrics"): _list("Numbers for Prometheus", "metrics"),
    ("GET", "/openapi.json"): _list("This document", "object"),
    ("POST", "/sdapi/v1/txt2img"): Operation("Images from a text", ("web_ui_images",), fields=TXT2IMG),
    ("POST", "/sdapi/v1/img2img"): Operation(
        "Images from an image, or of the part under a mask", ("web_ui_images",), fields=IMG2IMG,
        required=("init_images",),
    ),
    ("GET", "/sdapi/v1/progress"): Operation("How far the caller's request is", ("progress",), query=sdapi.PROGRESS),
    ("POST", "/sdapi/v1/interrupt"): Operation(
        "End the caller's requests", ("object",), fields=sdapi.MEANT, may_be_empty=True, query=sdapi.MEANT
    ),
    ("POST", "/sdapi/v1/skip"): Operation(
        "End the current batch", ("object",), fields=sdapi.MEANT, may_be_empty=True, query=sdapi.MEANT
    ),
    ("GET", "/sdapi/v1/options"): _list("The caller's settings", "object"),
    ("POST", "/sdapi/v1/options"): Operation("Change some of them", ("null",), fields=SETTINGS),
    ("POST", "/sdapi/v1/png-info"): Operation(
        "How a picture was made", ("png_info",), fields=sdapi_lists.PNG_INFO, required=("image",)
    ),
    ("GET", "/sdapi/v1/embeddings"): _list("Words that prompts may use", "object"),
    ("GET", "/sdapi/v1/cmd-flags"): _list("How the server was started", "object"),
    ("GET", "/sdapi/v1/memory"): _list("The memory of the workers", "object"),
    ("GET", "/sdapi/v1/scripts"): _list("Scripts: there are none", "object"),
}  # fmt: skip


def document(routes: Sequence[BaseRoute]) -> Schema:
    """The document of these routes. Under /sdapi, one without an operation is a list."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not isinstance(route, Route) or not route.path.startswith(APIS):
            continue
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operation = _of(method, route.path)
            paths.setdefault(route.path, {})[method.lower()] = _operation(method, route.path, operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sdopt serve", "version": __version__, "description": "Stable Diffusion behind HTTP"},
        "paths": paths,
        "components": {
            "schemas": {name: schema for name, (_, schema) in ANSWERS.items()},
            "securitySchemes": {name: {"type": "http", "scheme": scheme} for name, scheme in SCHEMES.items()},
        },
        "security": [{}, *({name: []} for name in SCHEMES)],  # {}: without a key file
    }


def _of(method: str, path: str) -> Operation:
    if path.startswith(WEB_UI) and method == "GET" and (method, path) not in OPERATIONS:
        return _list(f"A list: {path.rpartition('/')[2]}")
    return OPERATIONS[method, path]


def _operation(method: str, path: str, operation: Operation) -> Schema:
    is_web_ui = path.startswith(WEB_UI)
    wrong = 422 if is_web_ui else 400
    errors = (wrong, *(COMMON if method == "POST" else (*READING, 409, 500, 503)))
    statuses: Schema = {str(status): answer(operation.answers) for status in operation.status}
    error = "web_ui_error" if is_web_ui else "error"
    own: Schema = {
        "summary": operation.summary,
        "operationId": re.sub(r"[^a-z0-9]+", "_", f"{method} {path}".lower()).strip("_"),
        "parameters": _parameters(path, operation.query),
        "responses": {
            **{str(status): {**answer((error,)), "description": ERRORS[status]} for status in errors}, **statuses
        },
    }  # fmt: skip
    if operation.fields:
        kind = "multipart/form-data" if operation.is_form else "application/json"
        schema = body_schema(operation.fields, operation.required, is_form=operation.is_form)
        own["requestBody"] = {"required": not operation.may_be_empty, "content": {kind: {"schema": schema}}}
    return own


def _parameters(path: str, query: Fields) -> list[Schema]:
    inside = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    asked = [
        {"name": name, "in": "query", "required": False, "description": one.help, "schema": one.kind.schema()}
        for name, one in query.items()
    ]
    return [*inside, *asked]


def body_schema(fields: Fields, required: Sequence[str] = (), *, is_form: bool = False) -> Schema:
    """The JSON Schema of a body with these fields and no others."""
    properties = {name: field_schema(name, one, is_form=is_form) for name, one in fields.items()}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def field_schema(name: str, keyword: Keyword, *, is_form: bool = False) -> Schema:
    """The JSON Schema of one field, with its help and its default; null leaves it out. A form has no null."""
    told = keyword.describe(name)
    own = {key: value for key, value in told.items() if key not in ("name", "help", "default", "otherwise", "optional")}
    schema = _translated(own, is_form)
    if told["optional"] and not is_form:
        schema = {"anyOf": [schema, {"type": "null"}]}
    help = told["help"] + (f" (without it: {told['otherwise']})" if told["otherwise"] else "")
    return {**schema, "description": help, **({} if told["default"] is None else {"default": told["default"]})}


def _translated(schema: Schema, is_form: bool) -> Schema:
    """A kind's own words in those of JSON Schema: a picture is a file of a form, or a text in base64."""
    if schema.get("type") != "picture":
        return schema
    one: Schema = {"type": "string", "format": "binary"} if is_form else {"type": "string", "contentEncoding": "base64"}
    several: Schema = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
    if is_form or not schema.get("named"):
        return one if is_form else several
    return {"anyOf": [*cast("list[Any]", several["anyOf"]), {"type": "object", "additionalProperties": several}]}


async def openapi(request: Request) -> Response:
    return JSONResponse(document(request.app.routes))


ROUTES = [Route("/openapi.json", openapi, methods=["GET"])]
