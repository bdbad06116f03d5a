"""`--control NAME=FILE:SCALE`, `--ip-adapter NAME=FILE:SCALE`: the pictures of adapters on a command line.

A union ControlNet sees pictures of several kinds, its modes: `--control union/depth=depth.png:0.8`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.cli.prepare import Way, prepared
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.request.control_mode import MODE, mode_of

if TYPE_CHECKING:
    from sdopt.pipeline import Pipeline

NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)(?:/([A-Za-z0-9_-]+))?=(.+)", re.DOTALL)
SCALE = re.compile(r"(.+):(-?\d+\.?\d*)", re.DOTALL)
CONTROL = "control_image"
OF_NETS, OF_FEATURES = (
    ("controlnet_conditioning_scale", "--control-scale"),
    ("adapter_conditioning_scale", "--adapter-scale"),
)


@dataclass(frozen=True)
class Seen:
    """A flag for the pictures of adapters.

    `scales`: the keyword of the scale for each kind of adapter, and its flag. `several`: one adapter sees any number of
    pictures. `modes`: these may have modes.
    """

    flag: str
    title: str
    scales: Mapping[str, tuple[str, str]]
    several: bool = False
    modes: bool = False


SEEN = {  # by keyword
    CONTROL: Seen(
        "--control",
        "ControlNet",
        {"controlnet": OF_NETS, "controlnet_union": OF_NETS, "t2i_adapter": OF_FEATURES},
        modes=True,
    ),
    "ip_adapter_image": Seen(
        "--ip-adapter", "IP-Adapter", {"ip_adapter": ("ip_adapter_scale", "--ip-adapter-scale")}, several=True
    ),
}


@dataclass(frozen=True)
class Entry:
    """One picture; "" and None for what is left out."""

    name: str
    mode: str
    path: str
    scale: float | None


def options(
    keyword: str, texts: Sequence[str], typed: Mapping[str, Any], ways: Mapping[int, Way] | None = None
) -> dict[str, Any]:
    """The keywords that these arguments are, but for scales; `typed`: those of other flags.

    `ways`: how a picture is prepared, by its place.
    Raises: UsageError for a file that is no picture, a name that is given twice without modes, and a scale or a mode
    that is not allowed, or stands beside the flag that is for it; as `prepared` does.
    """
    from sdopt.image.pil import open_image

    seen = SEEN[keyword]
    parsed = [_parsed(text, seen) for text in texts]
    entries = _by_name(parsed)
    for name, own in entries.items():
        _refuse_unlike(seen, name, own, alone=len(entries) == 1)
    if "" in entries and len(entries) > 1:
        raise UsageError(f"several {seen.flag}: each needs its name, as in {seen.flag} canny=edges.png")
    flags = dict(seen.scales.values())
    if any(entry.scale is not None for entry in parsed) and flags.keys() <= typed.keys():
        raise _twice(seen, *flags.values())
    modes = {name: [mode_of(entry.mode) for entry in own] for name, own in entries.items() if own[0].mode}
    if modes and MODE in typed:
        raise UsageError(f"{seen.flag} NAME/MODE=FILE and --control-mode: give one of the two")
    pictures: dict[str, list[Any]] = {}
    for place, entry in enumerate(parsed):
        picture, way = open_image(entry.path), (ways or {}).get(place)
        pictures.setdefault(entry.name, []).append(picture if way is None else prepared(picture, way, typed))
    one = {name for name in entries if not seen.several and name not in modes}
    given: dict[str, Any] = {keyword: {name: own[0] if name in one else own for name, own in pictures.items()}}
    return {**given, MODE: modes} if modes else given


def _by_name(parsed: Sequence[Entry]) -> dict[str, list[Entry]]:
    entries: dict[str, list[Entry]] = {}
    for entry in parsed:
        entries.setdefault(entry.name, []).append(entry)
    return entries


def names(texts: Sequence[str]) -> list[str]:
    """The names of adapters in the arguments of --control or --ip-adapter; "" for one without a name."""
    return [_parsed(text, SEEN[CONTROL]).name for text in texts]


def has_scale(text: str) -> bool:
    """Whether a scale stands behind the file."""
    return _parsed(text, SEEN[CONTROL]).scale is not None


def scales(keyword: str, texts: Sequence[str], typed: Mapping[str, Any], pipe: Pipeline) -> dict[str, Any]:
    """The keywords of the scales in these arguments: that of a picture is a scale of its adapter's kind.

    `typed`: the keywords of all flags.
    Raises: UsageError for a scale beside the flag of the same, and a name that the bundle does not have.
    """
    from sdopt.request.named import named

    seen = SEEN[keyword]
    entries = _by_name([_parsed(text, seen) for text in texts])
    if all(entry.scale is None for own in entries.values() for entry in own):
        return {}
    of_modes = len(entries) == 1 and next(iter(entries.values()))[0].mode  # the scales are those of its pictures
    given = {
        name: [entry.scale for entry in own] if of_modes else [_only([entry.scale for entry in own])]
        for name, own in entries.items()
    }
    made: dict[str, list[float | None]] = {}
    flags = dict(seen.scales.values())
    for name, own in named(keyword, tuple(seen.scales), given, pipe.bundle, pipe.pool.adapter).items():
        kind = pipe.pool.adapter(name).manifest.kind
        if kind in seen.scales:  # the plan refuses another one
            made.setdefault(seen.scales[kind][0], []).extend(own)
    used = {own: numbers for own, numbers in made.items() if any(number is not None for number in numbers)}
    for own in used:
        if own in typed:
            raise _twice(seen, flags[own])
    return {own: [1.0 if number is None else number for number in numbers] for own, numbers in used.items()}


def _twice(seen: Seen, *flags: str) -> UsageError:
    return UsageError(f"{seen.flag} NAME=FILE:SCALE and {', '.join(flags)}: give one of the two")


def _check_scale(what: str, keyword: str, scale: float) -> None:
    """Raises: UsageError for a scale that the keyword does not allow."""
    from sdopt.request.keywords import KEYWORDS

    try:
        KEYWORDS[keyword].check(keyword, scale)
    except UsageError as error:
        allowed = str(error).partition("; ")[2].partition(", or")[0]
        raise UsageError(f"{what}: the scale is {scale:g}; {allowed}") from error


def _refuse_unlike(seen: Seen, name: str, own: Sequence[Entry], *, alone: bool) -> None:
    """Raises: UsageError for pictures of one adapter that do not go together. `alone`: it is the only adapter."""
    what = f"{seen.flag} {name}=..." if name else f"{seen.flag} without a name"
    moded = [entry for entry in own if entry.mode]
    if moded and len(moded) < len(own):
        raise UsageError(f"{what} and {seen.flag} {name}/{moded[0].mode}=...: give each picture its mode")
    if len(own) > 1 and not seen.several and not moded:
        hint = f"; those of a union ControlNet have modes: {seen.flag} {name or 'NAME'}/MODE=FILE" if seen.modes else ""
        raise UsageError(f"{what} is given {len(own)} times; each {seen.title} sees one picture{hint}")
    for entry in own:
        if entry.scale is not None:
            _check_scale(what, next(iter(seen.scales.values()))[0], entry.scale)
    scales = [str(entry.scale) for entry in own if entry.scale is not None]
    if len(set(scales)) > 1 and not (moded and alone):
        raise UsageError(f"{what} has the scales {', '.join(scales)}; give one")


def _only(scales: Sequence[float | None]) -> float | None:
    return next((scale for scale in scales if scale is not None), None)


def _parsed(text: str, seen: Seen) -> Entry:
    """The parts of "canny=edges.png:0.8" or "union/depth=depth.png"."""
    if _is_file(text):
        return Entry("", "", text, None)
    named = NAME.fullmatch(text)
    if named is not None and named[2] and not seen.modes:
        named = None
    name, mode, rest = (named[1], named[2] or "", named[3]) if named else ("", "", text)
    scaled = None if _is_file(rest) else SCALE.fullmatch(rest)
    return Entry(name, mode, scaled[1], float(scaled[2])) if scaled else Entry(name, mode, rest, None)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a NUL
        return False
