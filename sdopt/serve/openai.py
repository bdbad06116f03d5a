"""OpenAI's Images API, as its official client sends and reads it.

    POST /v1/images/generations    JSON
    POST /v1/images/edits          a form with `image` and, if wanted, `mask`
    POST /v1/images/variations     a form with `image`
    GET  /v1/models, /v1/models/NAME

Keywords of sdopt stand beside OpenAI's fields, where the client's `extra_body` puts them. A mask is OpenAI's where it
has transparent pixels, which are painted; else white is painted, as in diffusers.
Ref: openai-python 3.57, openai/types/image_generate_params.py, image_edit_params.py, images_response.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

from PIL import Image, ImageChops
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sdopt.errors import UsageError, shown
from sdopt.request.arrays import Picture
from sdopt.request.keyword import Keyword
from sdopt.request.kinds import Choice, Integer, Number, Switch
from sdopt.serve import tasks
from sdopt.serve.context import Context, caller_of, context_of, form_body, json_body
from sdopt.serve.disconnect import unless_gone
from sdopt.serve.fields import limit_default, options_of, picture
from sdopt.serve.kinds import Only, Table, Text
from sdopt.serve.orders import Encoding, Failed, Finished, Moved
from sdopt.serve.replies import HttpError
from sdopt.serve.sse import HEADERS, PING, events_or_pings
from sdopt.serve.tasks import Task, Wish

FORMATS: dict[str, Literal["PNG", "JPEG", "WEBP"]] = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
IGNORED = {  # they have no meaning for Stable Diffusion, and change nothing -> what is allowed
    "quality": ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"),
    "moderation": ("low", "auto"),
    "style": ("vivid", "natural"),
    "input_fidelity": ("high", "low"),
}
OWN: dict[str, Keyword] = {  # the fields that are no keywords of a picture
    "model": Keyword("GET /v1/models lists them", Text('"emoji"'), None, "the first one"),
    "prompt": Keyword("what to draw", Text()),
    "n": Keyword("how many pictures; picture i has seed + i", Integer(1, 64), 1),
    "size": Keyword("WIDTHxHEIGHT, or auto", Text('"512x768"'), None, "the bundle's"),
    "background": Keyword("pictures are opaque", Only(("opaque", "auto"), "Stable Diffusion paints no transparency")),
    "output_format": Keyword("of the pictures", Choice(tuple(FORMATS), '"png"'), "png"),
    "output_compression": Keyword("quality of jpeg and webp", Integer(0, 100, "90"), None, "95"),
    "response_format": Keyword("base64", Only(("b64_json",), "this server keeps no files for a URL")),
    "stream": Keyword("server-sent events in place of one answer", Switch("true"), False),
    "partial_images": Keyword("previews of each picture, with stream", Integer(0, 3), 0),
    "user": Keyword("whose share of the device this is", Text('"ann"')),
    "safety_identifier": Keyword("the same", Text('"ann"')),
    "lora": Keyword("weights of the LoRAs of GET /v1/models", Table(Number(-100, 100), '{"neon": 0.8}')),
    "deterministic": Keyword("no other picture shares its calls of the UNet", Switch("true"), False),
    "deadline": Keyword("seconds after which it is of no use", Number(0, 86400, between=True, example="60")),
    **{name: Keyword("changes nothing", Choice(words, f'"{words[0]}"')) for name, words in IGNORED.items()},
}
FILES = {
    "image": Keyword("the picture to begin from", Picture("image"), optional=False),
    "mask": Keyword("transparent, or white: painted anew", Picture("mask")),
}


async def generations(request: Request) -> Response:
    body = await json_body(request)
    if body.get("prompt") is None:
        raise HttpError(400, 'prompt is missing; send {"prompt": "a red apple"}', "prompt", "missing")
    return await _answer(request, body, "image_generation")


async def edits(request: Request) -> Response:
    body = await form_body(request, OWN)
    if body.get("prompt") is None:
        raise HttpError(400, "prompt is missing", "prompt", "missing")
    return await _answer(request, _with_pictures(request, body), "image_edit")


async def variations(request: Request) -> Response:
    body = await form_body(request, OWN)
    return await _answer(request, _with_pictures(request, {"prompt": "", **body}), "image_edit")


def _with_pictures(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """The body with OpenAI's files as keywords."""
    settings = context_of(request).settings
    images = body.pop("image", None)
    several = cast("list[Any]", images) if isinstance(images, list) else [images]
    if images is None or len(several) != 1:
        text = "image is missing" if images is None else f"image: {len(several)} pictures; this model takes one"
        raise HttpError(400, text, "image", "missing" if images is None else "invalid_value")
    body["image"] = picture("image", several[0], settings)
    mask = body.pop("mask", None)
    if mask is not None:
        body["mask_image"] = _mask(picture("mask", mask, settings))
    return body


def _mask(mask: Image.Image) -> Image.Image:
    """White where the picture is painted anew."""
    if "A" in mask.getbands():
        alpha = mask.getchannel("A")
        if cast("tuple[int, int]", alpha.getextrema())[0] < 255:
            return ImageChops.invert(alpha)
    return mask.convert("L")


def wish_of(context: Context, body: Mapping[str, Any], caller: str, timeout: str | None = None) -> Wish:
    """What a body asks for. `timeout`: the seconds that the client waits, as its header says.

    Raises: HttpError 400 and 404 that name the field.
    """
    settings, own = context.settings, read(body, OWN)
    bundle = context.model(own["model"])
    options = options_of(body, {*OWN, *FILES} - {"prompt", "image"}, settings)
    limit_default(options, context.models[bundle], settings)
    if own["size"] not in (None, "auto"):
        options |= _size(own["size"])
        options_of({k: options[k] for k in ("height", "width")}, (), settings)
    if own["n"] > settings.max_images:
        text = f"n = {own['n']}; this server makes up to {settings.max_images} pictures a request"
        raise HttpError(400, text, "n", "invalid_value")
    return Wish(
        bundle, options, own["n"], own["lora"] or {}, _caller(body, caller), _encoding(own), own["partial_images"],
        own["deadline"] or _seconds(timeout), own["deterministic"],
    )  # fmt: skip


def read(body: Mapping[str, Any], own: Mapping[str, Keyword]) -> dict[str, Any]:
    """These fields, checked, with the default of those that are left out. Raises: HttpError 400."""
    try:
        return {name: keyword.check(name, body.get(name)) for name, keyword in own.items()}
    except UsageError as error:
        raise HttpError(400, str(error), error.param, "invalid_value") from error


def _caller(body: Mapping[str, Any], caller: str) -> str:
    """Whose share of the device this is: of the user that a client names, among those of one key."""
    user = body.get("safety_identifier") or body.get("user") or ""
    return f"{caller}/{str(user)[:64]}" if user else caller


def _seconds(timeout: str | None) -> float | None:
    """The seconds in a client's header; None for none."""
    try:
        seconds = float(timeout) if timeout else 0.0
    except ValueError:
        return None
    return seconds if 0 < seconds <= 86400 else None


def _size(size: str) -> dict[str, int]:
    width, x, height = size.partition("x")
    if not x or not width.isascii() or not height.isascii() or not (width.isdigit() and height.isdigit()):
        text = f"size = {shown(size)}; allowed are WIDTHxHEIGHT, e.g. 512x768, and auto"
        raise HttpError(400, text, "size", "invalid_value")
    return {"width": int(width[:9]), "height": int(height[:9])}


def _encoding(own: Mapping[str, Any]) -> Encoding:
    name, quality = own["output_format"], own["output_compression"]
    if quality is not None and name == "png":
        text = "output_compression is for output_format jpeg and webp"
        raise HttpError(400, text, "output_compression", "invalid_value")
    return Encoding(FORMATS[name], quality)


async def _answer(request: Request, body: Mapping[str, Any], kind: str) -> Response:
    context = context_of(request)
    timeout = request.headers.get("x-stainless-read-timeout")
    wish = await asyncio.to_thread(wish_of, context, body, caller_of(request), timeout)  # it may decode large pictures
    if not body.get("stream"):
        if wish.previews:
            raise HttpError(400, "partial_images needs stream=true", "partial_images", "invalid_value")
        task = context.tasks.create(wish)
        try:
            await unless_gone(request, task.settled())
        except BaseException:
            context.tasks.cancel(task)
            raise
        finally:
            context.tasks.forget(task)
        if task.failure is not None:
            raise as_sent(HttpError.of(task.failure), body)
        return JSONResponse(_response(task), headers=_ignored(body))
    task = context.tasks.create(wish)
    await task.accepted()
    if task.failure is not None:  # before a byte is sent, so that the status can say so
        raise as_sent(HttpError.of(task.failure), body)
    lines = _stream(context, task, kind)
    headers = {**HEADERS, **_ignored(body)}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


def as_sent(error: HttpError, body: Mapping[str, Any]) -> HttpError:
    """An error that names the field which the client sent: `size` is height and width."""
    if body.get("size") in (None, "auto") or error.param not in ("height", "width"):
        return error
    return replace(error, message=f"size = {body['size']}: {error.message}", param="size")


def _ignored(body: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in IGNORED if body.get(name) is not None]
    return {"x-sdopt-ignored": ", ".join(names)} if names else {}


def _response(task: Task) -> dict[str, Any]:
    first = task.pictures[0]
    return {
        "created": int(task.created),
        "data": [_data(picture) for picture in task.pictures],
        "background": "opaque",
        "output_format": _format(task),
        "size": f"{first.width}x{first.height}",
        "model": task.wish.bundle,
    }


def _data(picture: tasks.Picture) -> dict[str, Any]:
    finished = cast(Finished, picture.finished)
    return {
        "b64_json": base64.b64encode(finished.content).decode(),
        "seed": finished.parameters["seed"],
        "parameters": finished.parameters,
    }


def _format(task: Task) -> str:
    return next(word for word, name in FORMATS.items() if name == task.wish.encoding.format)


async def _stream(context: Context, task: Task, kind: str) -> AsyncIterator[bytes]:
    """The events of a task as server-sent events; `: ping` where nothing happens for a while."""
    partials = dict.fromkeys(range(len(task.pictures)), 0)
    try:
        yield b": queued\n\n"
        async for one in events_or_pings(task, context.settings.ping_seconds):
            if one is None:
                yield PING
                continue
            picture, event = task.pictures[one.image], one.event
            if isinstance(event, Failed):
                yield _line("error", HttpError.of(event).body)
                return
            if isinstance(event, Moved) and event.preview is not None:
                own = {"b64_json": base64.b64encode(event.preview).decode(), "partial_image_index": partials[one.image]}
                partials[one.image] += 1
                yield _line(f"{kind}.partial_image", {**own, **_beside(task, picture, one.image)})
            if isinstance(event, Finished):
                own = {**_data(picture), "usage": None}
                yield _line(f"{kind}.completed", {**own, **_beside(task, picture, one.image)})
    finally:
        context.tasks.cancel(task)  # what is not done by now, nobody reads
        context.tasks.forget(task)


def _beside(task: Task, picture: tasks.Picture, image: int) -> dict[str, Any]:
    return {
        "created_at": int(task.created),
        "size": f"{picture.width}x{picture.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": _format(task),
        "image_index": image,
    }


def _line(kind: str, data: Mapping[str, Any]) -> bytes:
    body = data if kind == "error" else {"type": kind, **data}
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n".encode()


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(n, m) for n, m in context_of(request).models.items()]})


async def model(request: Request) -> Response:
    context = context_of(request)
    name = context.model(request.path_params["name"])
    return JSONResponse(_model(name, context.models[name]))


def _model(name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sdopt", "sdopt": described}


ROUTES = [
    Route("/v1/images/generations", generations, methods=["POST"]),
    Route("/v1/images/edits", edits, methods=["POST"]),
    Route("/v1/images/variations", variations, methods=["POST"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{name}", model, methods=["GET"]),
]
