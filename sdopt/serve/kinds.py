"""Kinds of values that fields of routes have, beside those of keywords; see `sdopt.request.kinds`."""

from __future__ import annotations

import re
from typing import Any, cast

from sdopt.dataclass import dataclass
from sdopt.request.kinds import Kind, Schema, text


@dataclass(frozen=True)
class Text(Kind):
    """One text."""

    example: str = '"a red apple"'

    def allowed(self) -> str:
        return "is one text, in Unicode"

    def read(self, value: Any) -> str:
        return text(value)

    def schema(self) -> Schema:
        return {"type": "string", "maxLength": 8192}


@dataclass(frozen=True)
class Matching(Kind):
    """A text that a regular expression matches as a whole; `noun` says so in words."""

    pattern: str
    noun: str
    example: str = ""

    def allowed(self) -> str:
        return f"are {self.noun}"

    def read(self, value: Any) -> str:
        if not re.fullmatch(self.pattern, text(value)):
            raise ValueError
        return text(value)

    def schema(self) -> Schema:
        return {"type": "string", "pattern": f"^{self.pattern}$"}


@dataclass(frozen=True)
class Either(Kind):
    """A value of one kind, or of another."""

    first: Kind
    second: Kind
    example: str = ""

    def allowed(self) -> str:
        return f"{self.first.allowed()}, and {self.second.allowed().removeprefix('are ')}"

    def read(self, value: Any) -> Any:
        try:
            return self.first.read(value)
        except (ValueError, TypeError):
            return self.second.read(value)

    def schema(self) -> Schema:
        return {"anyOf": [self.first.schema(), self.second.schema()]}


@dataclass(frozen=True)
class Base64(Kind):
    """A picture as text, which the route opens."""

    example: str = ""

    def allowed(self) -> str:
        return "is a PNG, JPEG or WebP picture in base64, or a data URL"

    def read(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        return value

    def schema(self) -> Schema:
        return {"type": "string", "contentEncoding": "base64"}


@dataclass(frozen=True)
class List(Kind):
    """A list of values of one kind, of `most` values or fewer."""

    of: Kind
    most: int
    least: int = 0
    example: str = ""

    def allowed(self) -> str:
        count = f"{self.least} to {self.most}" if self.least < self.most else str(self.most)
        return f"is a list of {count}, each {self.of.allowed().removeprefix('is ')}"

    def read(self, value: Any) -> list[Any]:
        if not isinstance(value, list) or not self.least <= len(cast("list[Any]", value)) <= self.most:
            raise ValueError
        return [self.of.read(one) for one in cast("list[Any]", value)]

    def schema(self) -> Schema:
        return {"type": "array", "items": self.of.schema(), "minItems": self.least, "maxItems": self.most}


@dataclass(frozen=True)
class Table(Kind):
    """A JSON object whose values are of one kind; None: whatever the route takes."""

    of: Kind | None = None
    example: str = ""

    def allowed(self) -> str:
        return "is a JSON object" + ("" if self.of is None else f", each of whose values {self.of.allowed()}")

    def read(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError
        table = cast("dict[str, Any]", value)
        return dict(table) if self.of is None else {key: self.of.read(one) for key, one in table.items()}

    def schema(self) -> Schema:
        return {"type": "object"} if self.of is None else {"type": "object", "additionalProperties": self.of.schema()}


@dataclass(frozen=True)
class Only(Kind):
    """What a protocol has and this server has not: the values that ask for nothing, and what to do instead."""

    values: tuple[Any, ...]
    instead: str
    example: str = ""

    def allowed(self) -> str:
        shown = " and ".join(dict.fromkeys(repr(value) for value in self.values))
        return f"{'is' if len(self.values) == 1 else 'are'} {shown}: {self.instead}"

    def read(self, value: Any) -> Any:
        if value not in self.values:
            raise ValueError
        return value

    def schema(self) -> Schema:
        return {"enum": list(self.values)}
