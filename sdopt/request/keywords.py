"""All keywords of a request by name, and what is made of their table (`sdopt.request.options`).

    KEYWORDS["clip_skip"]   what is declared of it
    checked(options)        every keyword, checked, with defaults for those that were left out
    recorded(options, ...)  what makes the picture again, as its PNG carries it
    replayed(record)        the options in such a record
    describe()              all keywords as JSON, for a form or a server

`prompt`, which may be given by its place, is the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from sdopt.errors import UsageError, choices
from sdopt.request.keyword import Flag, Keyword, plain
from sdopt.request.kinds import Texts
from sdopt.request.options import Options


def _keywords() -> dict[str, Keyword]:
    """The keywords by name, in the order of `Options`; those whose type has None are optional."""
    found = {"prompt": Keyword("what to draw", Texts(), flag=Flag(("prompt",), "PROMPT"), record="always")}
    for name, hint in get_type_hints(Options, include_extras=True).items():
        type_, keyword = get_args(hint)
        found[name] = replace(keyword, optional=type_ is Any or type(None) in get_args(type_))
    return found


KEYWORDS: dict[str, Keyword] = _keywords()


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every keyword, checked, and with the default if it was left out.

    Raises: UsageError naming the keyword, its value and what is allowed.
    """
    for name in options:
        if name not in KEYWORDS:
            raise UsageError(f"unknown argument {name}; there are {choices(name, KEYWORDS)}", name)
    return {
        name: keyword.check(name, options[name]) if name in options else keyword.default
        for name, keyword in KEYWORDS.items()
    }


def recorded(options: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture's PNG carries of these options; `resolved` takes the place of what was given, and is carried."""
    carried: dict[str, Any] = {}
    for name, keyword in KEYWORDS.items():
        value = resolved.get(name, options[name])
        if name in resolved or keyword.records(value):
            carried[name] = plain(value)
    return carried


def replayed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options in what a PNG carries."""
    return {name: value for name, value in record.items() if name in KEYWORDS and KEYWORDS[name].record != "never"}


def describe() -> list[dict[str, Any]]:
    """Every keyword as JSON: name, type, range, default and help."""
    return [keyword.describe(name) for name, keyword in KEYWORDS.items()]
