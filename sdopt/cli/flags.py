"""The keywords of a request as flags of a command line. `sdopt.request.keywords` says how each is spelled."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, cast

from sdopt.cli import controls, prepare
from sdopt.cli.parser import Parser
from sdopt.cli.prepare import Way
from sdopt.cli.prompts import seeds
from sdopt.request.arrays import Picture, PicturesByName
from sdopt.request.keyword import Flag, Keyword
from sdopt.request.keywords import KEYWORDS
from sdopt.request.kinds import Texts

# the groups of the help, in its order -> how the names of their keywords begin
GROUPS = {
    "text": ("prompt", "negative_prompt", "clip_skip"),
    "picture": ("height", "width", "num_images_per_prompt", "seed", "rng"),
    "steps": ("num_inference_steps", "sampler", "schedule", "mu", "eta", "timesteps", "sigmas"),
    "guidance": ("guidance",),
    "ControlNets": ("control", "guess"),
    "IP-Adapters": ("ip_adapter",),
    "from a picture": ("image", "strength", "mask", "padding_mask", "denoising"),
    "hires fix": ("hires",),
    "SDXL": ("original", "crops", "target", "negative_original", "negative_crops", "negative_target"),
    "SDXL's refiner": ("aesthetic", "negative_aesthetic"),
}
OTHERS = "memory and speed"
OF_ONE = ("prompt", "num_images_per_prompt")  # keywords that a list of pictures says in other ways


def _group_of(name: str) -> str:
    return next((title for title, beginnings in GROUPS.items() if name.startswith(beginnings)), OTHERS)


def add_flags(parser: Parser, *, of_all: bool = False) -> None:
    """Add a flag for every keyword that has one. The value of a flag that is not typed is None, or False for a switch.

    Keywords that are parts of one flag, as width and height are of `--size`, share it.
    `of_all`: only those that pictures of a list may have in common; their own prompt and pictures are none.
    """
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys((*GROUPS, OTHERS))}
    added: set[str] = set()
    for name, keyword in KEYWORDS.items():
        flag = keyword.flag
        if flag is None or destination(name, flag) in added:
            continue
        if of_all and (name in OF_ONE or isinstance(keyword.kind, (Picture, PicturesByName))):
            continue
        added.add(destination(name, flag))
        settings: dict[str, Any] = keyword.kind.flag() if flag.part is None else {"type": size}
        if flag.metavar is not None:
            settings["metavar"] = flag.metavar
        names = flag.names or (f"--{name.replace('_', '-')}",)
        is_positional = not names[0].startswith("-")
        if is_positional:
            settings["nargs"] = "*"
        if name == "seed":
            settings = {"type": int, "metavar": "SEED"} if of_all else {"type": seeds, "metavar": "SEED[,SEED...]"}
        action = groups[_group_of(name)].add_argument(*names, help=help_of(keyword), **settings)
        if isinstance(keyword.kind, Texts):
            parser.may_be_empty.add(action.dest)
    if not of_all:
        prepare.add_flags(groups["ControlNets"].add_argument)


def help_of(keyword: Keyword) -> str:
    """The help text of a keyword, with its default. A percent sign is doubled, as argparse wants it."""
    default = keyword.otherwise or _default_text(keyword.default)
    text = f"{keyword.help} (default: {default})" if default else keyword.help
    return text.replace("%", "%%")


def _default_text(default: Any) -> str:
    """A default as it is typed; empty for None, and for the False of a switch."""
    if default is None or default is False:
        return ""
    values = cast(tuple[Any, ...], default) if isinstance(default, tuple) else (default,)
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def destination(name: str, flag: Flag) -> str:
    """The attribute of argparse's namespace that holds the flag's value."""
    return (flag.names[-1] if flag.names else name).lstrip("-").replace("-", "_")


def typed(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords whose flags were typed, with what argparse read."""
    values = {
        name: getattr(args, destination(name, keyword.flag), None)
        for name, keyword in KEYWORDS.items()
        if keyword.flag is not None
    }
    return {name: value for name, value in values.items() if not (value is None or value is False or value == [])}


def given(args: argparse.Namespace, ways: Mapping[int, Way] | None = None) -> dict[str, Any]:
    """The keywords whose flags were typed, with their values. Files of pictures are opened.

    `ways`: how the picture of each --control is prepared, by its place, if the flags for it do not say it.
    Raises: UsageError for a file that is not a picture; as `prepared` does.
    """
    keywords: dict[str, Any] = {}
    named: dict[str, list[str]] = {}
    hows: Mapping[int, Way] = (getattr(args, "prepare", None) or {}) if ways is None else ways
    for name, value in typed(args).items():
        keyword = KEYWORDS[name]
        if isinstance(keyword.kind, PicturesByName):
            named[name] = value
            continue
        part = None if keyword.flag is None else keyword.flag.part
        keywords[name] = keyword.kind.from_flag(value) if part is None else value[part]
    made: dict[str, Any] = {}
    for name, texts in named.items():
        made |= controls.options(name, texts, keywords, hows if name == controls.CONTROL else None)
    return prepare.beside(keywords, hows, made)


def spelled(name: str, flag: Flag) -> str:
    """A flag as it is typed: `--clip-skip`; the metavar of one that is given by its place."""
    word = flag.names[-1] if flag.names else f"--{name.replace('_', '-')}"
    return word if word.startswith("-") else str(flag.metavar or word.upper())


def flag_names(keywords: Mapping[str, Any]) -> list[str]:
    """The flags of these keywords as they are typed. A flag of several keywords is named once."""
    flags = {name: KEYWORDS[name].flag for name in keywords}
    return list(dict.fromkeys(spelled(name, flag) for name, flag in flags.items() if flag is not None))


def size(text: str) -> tuple[int, int]:
    """(width, height) of "512x768"."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, e.g. 512x768") from None
    return width, height
