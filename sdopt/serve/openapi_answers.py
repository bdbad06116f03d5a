"""What the routes answer, as JSON Schema: the fields that clients may count on. Others may be beside them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
SWITCH: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
JSON = "application/json"
PICTURES = ("image/png", "image/jpeg", "image/webp")


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _table(**fields: Schema) -> Schema:
    """An object that has all of these fields."""
    return {"type": "object", "properties": fields, "required": list(fields)}


PICTURE = _table(b64_json=TEXT, seed=WHOLE, parameters=OBJECT)
MODEL = _table(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT, sdopt=OBJECT)
STATUS: Schema = {"enum": ["queued", "running", "completed", "failed", "cancelled"]}
ERROR = _table(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT))
MADE = _table(
    status=STATUS, index=WHOLE, of=WHOLE, seed=WHOLE, width=WHOLE, height=WHOLE, b64_json=_or_null(TEXT),
    parameters=_or_null(OBJECT),
)  # fmt: skip
JOB = _table(
    id=TEXT, object={"const": "job"}, status=STATUS, model=TEXT, created=WHOLE, ended=_or_null(WHOLE),
    position=_or_null(WHOLE), output_format=TEXT, data=_list(MADE), error=_or_null(ERROR),
)  # fmt: skip
STATE = _table(
    skipped=SWITCH, interrupted=SWITCH, job=TEXT, job_count=WHOLE, job_timestamp=TEXT, job_no=WHOLE,
    sampling_step=WHOLE, sampling_steps=WHOLE,
)  # fmt: skip
ANSWERS: dict[str, tuple[tuple[str, ...], Schema]] = {  # name -> (content types, schema)
    "images": (
        (JSON,),
        _table(
            created=WHOLE, data=_list(PICTURE), background=TEXT, output_format=TEXT, size=TEXT, model=TEXT
        ),
    ),
    "events": (("text/event-stream",), _table(event=TEXT, data=TEXT)),  # one event; data is JSON
    "models": ((JSON,), _table(object={"const": "list"}, data=_list(MODEL))),
    "model": ((JSON,), MODEL),
    "keywords": (
        (JSON,),
        _table(
            object={"const": "list"}, data=_list(OBJECT), samplers=_list(OBJECT), schedules=_list(TEXT), limits=OBJECT
        ),
    ),
    "job": ((JSON,), JOB),
    "jobs": ((JSON,), _table(object={"const": "list"}, data=_list(JOB))),
    "picture": (PICTURES, {"type": "string", "contentEncoding": "binary"}),
    "health": ((JSON,), _table(status=TEXT)),
    "metrics": (("text/plain",), TEXT),
    "object": ((JSON,), OBJECT),
    "list": ((JSON,), _list(OBJECT)),
    "null": ((JSON,), {"type": "null"}),
    "web_ui_images": ((JSON,), _table(images=_list(TEXT), parameters=OBJECT, info=TEXT)),
    "progress": (
        (JSON,),
        _table(
            progress=NUMBER, eta_relative=NUMBER, state=STATE, current_image=_or_null(TEXT), textinfo=_or_null(TEXT)
        ),
    ),
    "png_info": ((JSON,), _table(info=TEXT, items=OBJECT, parameters=OBJECT)),
    "error": ((JSON,), _table(error=ERROR)),
    "web_ui_error": ((JSON,), _table(error=TEXT, detail=TEXT, body=TEXT, errors=TEXT, param=_or_null(TEXT))),
}  # fmt: skip


def answer(names: tuple[str, ...]) -> Schema:
    """A response with one of these answers; without a name it has no content."""
    content = {
        kind: {"schema": {"$ref": f"#/components/schemas/{name}"}} for name in names for kind in ANSWERS[name][0]
    }
    return {"description": "it worked", **({"content": content} if content else {})}
