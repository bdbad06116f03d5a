"""The fields of a request and the keywords that they are: JSON, or the texts of a form.

Every keyword of `sdopt.request.keywords` is a field of the same name. Pictures are base64, alone or as a data URL. No
address is ever fetched and no path is opened. What is neither a keyword nor known to the route is refused by its name.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from PIL import Image

from sdopt.bundle.presets import refuse_unknown
from sdopt.errors import UsageError, choices, shown
from sdopt.image.pil import open_picture
from sdopt.request.arrays import EmbedsByName, Picture, PicturesByName, Tensor
from sdopt.request.keyword import Keyword
from sdopt.request.keywords import KEYWORDS
from sdopt.request.kinds import Choice, Name, Texts, Word
from sdopt.serve.kinds import Only, Text
from sdopt.serve.replies import HttpError
from sdopt.serve.settings import Settings

DATA_URL = re.compile(r"data:image/[a-z+.-]+;base64,", re.IGNORECASE)
TEXTS = (Texts, Text, Word, Choice, Name, Only, Picture, PicturesByName)  # kinds that a form's text is one of
NOT_SENT = ("num_images_per_prompt",)  # a route has its own word for it
MOST_PICTURES = 16  # in one request
NESTED = 2  # lists of pictures in lists: several for one adapter, each for one image
FORM_NAME = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<key>[^\[\]]*)\])?")


def options_of(body: Mapping[str, Any], own: Collection[str], settings: Settings) -> dict[str, Any]:
    """The keywords in a body, checked; `own` are the fields that the route reads itself.

    Raises: HttpError 400 that names the field.
    """
    options: dict[str, Any] = {}
    _refuse_many(body)
    for name, value in body.items():
        keyword = KEYWORDS.get(name)
        if name in own or value is None:
            continue
        if keyword is None or not is_sent(name, keyword):
            raise HttpError(400, _unknown(name, own), name, "unknown_parameter")
        options[name] = value_of(name, keyword, value, settings)
    _limit(options, settings)
    return options


def limit_default(options: Mapping[str, Any], described: Mapping[str, Any], settings: Settings) -> None:
    """Raises: HttpError 400 for a preset that the model has not, and where a request leaves out the steps, and those
    of its preset or of the model are above the limit."""
    name = options.get("preset")
    preset: Mapping[str, Any] = {} if name is None else _preset(name, described)
    _limit({**preset, **options}, settings)
    steps = described["defaults"]["num_inference_steps"]
    if steps > settings.max_steps and not {"num_inference_steps", "timesteps", "sigmas"} & {*preset, *options}:
        text = f"num_inference_steps is missing: the model's own {steps} are above this server's {settings.max_steps}"
        raise HttpError(400, text, "num_inference_steps", "missing")


def _preset(name: str, described: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keywords of a preset. Raises: HttpError 400 for a name that there is not."""
    try:
        refuse_unknown(name, tuple(described["presets"]), described["name"])
    except UsageError as error:
        raise HttpError(400, str(error), "preset", "invalid_value") from error
    return described["presets"][name]


def _refuse_many(body: Mapping[str, Any]) -> None:
    """Raises: HttpError 400 for more pictures than a request may have, before one of them is decoded."""
    kinds = {name: keyword.kind for name, keyword in KEYWORDS.items()}
    total = 0
    for name, value in body.items():
        kind = kinds.get(name)
        if not isinstance(kind, (Picture, PicturesByName)):
            continue
        tables = list(cast("Mapping[str, Any]", value).values()) if isinstance(value, Mapping) else [value]
        count = sum(_count(name, one, 0) for one in tables)
        if isinstance(kind, Picture) and count > 1:
            raise HttpError(400, f"{name}: {count} pictures; allowed is one", name, "invalid_value")
        total += count
        if total > MOST_PICTURES:
            text = f"{name}: more than {MOST_PICTURES} pictures in one request; send fewer"
            raise HttpError(400, text, name, "invalid_value")


def _count(name: str, value: Any, depth: int) -> int:
    """How many pictures a value is. Raises: HttpError 400 for lists in lists in lists."""
    if not isinstance(value, list):
        return 1
    if depth == NESTED:
        raise HttpError(400, f"{name}: lists in lists; allowed are a picture, and a list of pictures", name)
    return sum(_count(name, one, depth + 1) for one in cast("list[Any]", value))


def is_sent(name: str, keyword: Keyword) -> bool:
    """Whether a keyword can be a field: arrays cannot."""
    return name not in NOT_SENT and not isinstance(keyword.kind, (Tensor, EmbedsByName))


def value_of(name: str, keyword: Keyword, value: Any, settings: Settings) -> Any:
    """The value of one keyword. Raises: HttpError 400."""
    try:
        if isinstance(keyword.kind, Picture):
            value = _pictures(name, value, settings)
        elif isinstance(keyword.kind, PicturesByName):
            table = cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else None
            value = (
                _pictures(name, value, settings)
                if table is None
                else {key: _pictures(name, one, settings) for key, one in table.items()}
            )
        keyword.check(name, value)
    except UsageError as error:
        raise HttpError(400, str(error), error.param or name, "invalid_value") from error
    return value


def _unknown(name: str, own: Collection[str]) -> str:
    if name in KEYWORDS:
        return f"{name} cannot be sent over HTTP; " + ("use n" if name in NOT_SENT else "use the Python library")
    known = sorted({*own, *(key for key, keyword in KEYWORDS.items() if is_sent(key, keyword))})
    return f"unknown field {shown(name)}; there are {choices(name[:64], known)}"


def _limit(options: Mapping[str, Any], settings: Settings) -> None:
    """Raises: HttpError 400 for more than this server makes."""
    steps = options.get("num_inference_steps")
    if steps is not None and steps > settings.max_steps:
        text = f"num_inference_steps = {steps}; this server makes up to {settings.max_steps}"
        raise HttpError(400, text, "num_inference_steps", "invalid_value")
    if (options.get("hires_steps") or 0) > settings.max_steps:
        text = f"hires_steps = {options['hires_steps']}; this server makes up to {settings.max_steps}"
        raise HttpError(400, text, "hires_steps", "invalid_value")
    for name in ("timesteps", "sigmas"):
        if len(options.get(name) or ()) > settings.max_steps:
            text = f"{name}: {len(options[name])} numbers; this server makes up to {settings.max_steps} steps"
            raise HttpError(400, text, name, "invalid_value")
    for name in (f"{sign}{own}" for own in ("prompt", "prompt_2", "prompt_3") for sign in ("", "negative_")):
        text = options.get(name)
        if text is not None and not isinstance(text, str):
            raise HttpError(400, f"{name} = {shown(text)}; allowed is one text. Send a request for each.", name)
        if text is not None and len(text.encode()) > settings.max_prompt_bytes:
            size = len(text.encode())
            raise HttpError(400, f"{name} has {size} bytes; allowed are {settings.max_prompt_bytes}", name)
    if isinstance(options.get("seed"), list):
        raise HttpError(400, "seed: allowed is one number; image i of n takes seed + i", "seed", "invalid_value")
    factor = options.get("hires") or 1
    pixels = (options.get("height") or 1) * (options.get("width") or 1) * factor * factor
    if pixels > settings.max_pixels:
        text = f"{pixels:.0f} pixels; this server makes pictures of up to {settings.max_pixels}"
        raise HttpError(400, text, "size", "invalid_value")


def _pictures(name: str, value: Any, settings: Settings) -> Any:
    if isinstance(value, list):
        return [_pictures(name, one, settings) for one in cast("list[Any]", value)]
    if isinstance(value, Image.Image):
        return value
    return picture(name, value, settings)


def picture(name: str, value: Any, settings: Settings) -> Image.Image:
    """A picture from base64, a data URL, or bytes. Raises: HttpError 400."""
    try:
        return open_picture(name, io.BytesIO(picture_bytes(name, value)), settings.max_pixels)
    except UsageError as error:
        raise HttpError(400, str(error), name, "invalid_value") from error


def picture_bytes(name: str, value: Any) -> bytes:
    """The bytes of a picture in base64, of a data URL, or as they are. Raises: HttpError 400."""
    if isinstance(value, str):
        if re.match(r"[a-z]+://", value[:20], re.IGNORECASE):
            text = f"{name}: this server fetches no addresses; send the picture itself as base64"
            raise HttpError(400, text, name, "invalid_value")
        head = DATA_URL.match(value)
        try:
            value = base64.b64decode(value[head.end() if head else 0 :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise HttpError(400, f"{name} is no base64 ({error}); send a PNG, JPEG or WebP picture", name) from error
    if not isinstance(value, bytes):
        raise HttpError(400, f"{name} = {shown(value)}; allowed is a picture in base64, or a data URL", name)
    return value


def from_form(fields: list[tuple[str, Any]], own: Mapping[str, Keyword]) -> dict[str, Any]:
    """The body that a form's fields are: texts become the types of their keywords, `x[]` a list, `y[key]` a table.

    `own`: the route's own fields. Bytes, of files, stay as they are. A field that is there twice without
    brackets is refused. Raises: HttpError 400.
    """
    body: dict[str, Any] = {}
    for spelled, value in fields:
        match = FORM_NAME.fullmatch(spelled)
        if match is None:
            raise HttpError(400, f"{shown(spelled)} is no name of a field", spelled)
        name, key = match["name"], match["key"]
        typed = value if isinstance(value, bytes) else _typed(name, str(value), own)
        if key is None:
            if name in body:
                raise HttpError(400, f"{name} is there twice; send {name}[] for a list", name)
            body[name] = typed
        elif key == "":
            if not isinstance(body.setdefault(name, []), list):
                raise HttpError(400, f"{name} is there as {name}[] and in another way", name)
            body[name].append(typed)
        else:
            if not isinstance(body.setdefault(name, {}), dict):
                raise HttpError(400, f"{name} is there as {name}[{key}] and in another way", name)
            body[name][key] = typed
    return body


def _typed(name: str, text: str, own: Mapping[str, Keyword]) -> Any:
    """A text of a form as its field has it; what cannot be read stays a text, which the field's own check refuses."""
    keyword = own.get(name, KEYWORDS.get(name))
    if keyword is not None and isinstance(keyword.kind, TEXTS):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
