"""The keywords of a request as flags of a command line: `sdopt.request.options` says how each is spelled."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, cast

from sdopt.request.keyword import Flag, Keyword
from sdopt.request.keywords import KEYWORDS


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every keyword that has one. What is not given is None, or False for a switch."""
    known: set[str] = set()
    for name, keyword in KEYWORDS.items():
        if keyword.flag is None or destination(name, keyword.flag) in known:
            continue
        known.add(destination(name, keyword.flag))
        settings: dict[str, Any] = keyword.kind.flag() if keyword.flag.part is None else {"type": size}
        if keyword.flag.metavar is not None:
            settings["metavar"] = keyword.flag.metavar
        names = keyword.flag.names or (f"--{name.replace('_', '-')}",)
        if not names[0].startswith("-"):
            settings["nargs"] = "?"
        parser.add_argument(*names, help=help_of(keyword), **settings)


def help_of(keyword: Keyword) -> str:
    """The help of a keyword, and what leaving it out means."""
    text = keyword.help
    if keyword.otherwise:
        text += f" (default: {keyword.otherwise})"
    elif keyword.default is not None and keyword.default is not False:
        values = cast(tuple[Any, ...], keyword.default) if isinstance(keyword.default, tuple) else (keyword.default,)
        text += f" (default: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)})"
    return text.replace("%", "%%")


def destination(name: str, flag: Flag) -> str:
    """Where argparse puts it."""
    return (flag.names[-1] if flag.names else name).lstrip("-").replace("-", "_")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords whose flags were given, pictures opened.

    Raises: UsageError for a file that is no picture.
    """
    found: dict[str, Any] = {}
    for name, keyword in KEYWORDS.items():
        value = None if keyword.flag is None else getattr(args, destination(name, keyword.flag))
        if keyword.flag is not None and value is not None and value is not False:
            part = keyword.flag.part
            found[name] = keyword.kind.from_flag(value) if part is None else value[part]
    return found


def flag_names(keywords: Mapping[str, Any]) -> list[str]:
    """The flags of these keywords, as they are spelled, each once."""
    flags = {name: KEYWORDS[name].flag for name in keywords}
    return list(dict.fromkeys(destination(name, flag) for name, flag in flags.items() if flag is not None))


def size(text: str) -> tuple[int, int]:
    """(width, height) of "512x768"."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, e.g. 512x768") from None
    return width, height
