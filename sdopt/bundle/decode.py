"""JSON into frozen dataclasses, by their annotations, and back.

    @dataclass(frozen=True)
    class Latents:
        channels: Positive                          # an Annotated type: a type with a Rule
        scaling_factor: float | tuple[float, ...]

    decode(Latents, {"channels": 0}, "latents")     # DecodeError: latents.channels is 0; allowed is a whole number ...

An annotation may be bool, int, float, str, None, Json, a dataclass, `tuple[T, ...]`, a tuple of fixed length,
`Mapping[K, V]`, a union of these that differ in their JSON type, and any of them with rules in `Annotated`. A field
with a default may be left out; any other key is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
DEEPEST = 8  # lists and objects inside one another, where any JSON is allowed


class DecodeError(ValueError):
    """A value is not what its field takes. The text names the field, the value and what is allowed."""


@dataclass(frozen=True)
class Rule:
    """What a type allows beyond its JSON type; `allowed` ends the sentence "allowed is ..."."""

    allowed: str
    test: Callable[[Any], bool]


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda value: low <= value <= high)


def between(low: float, high: float) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda value: low <= value <= high)


def one_of(*words: str) -> Rule:
    return Rule(f"one of {', '.join(words)}", lambda value: value in words)


def matching(pattern: str, allowed: str) -> Rule:
    return Rule(allowed, lambda value: re.fullmatch(pattern, value) is not None)


class Json:
    """An annotation for any JSON value that is not deeper than DEEPEST."""


NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text without control characters",
    type(None): "null",
    Json: f"JSON with finite numbers, at most {DEEPEST} lists or objects inside one another",
}


def decode(kind: type[T] | Any, value: Any, where: str = "") -> T:
    """`value`, as json.loads gives it, as a `kind`; `where` is its path in the file.

    Raises: DecodeError that names the path, the value and what is allowed.
    """
    return cast(T, _decode(kind, value, (where,)))


def encode(value: Any) -> Any:
    """What json.dumps takes of a dataclass; optional fields that are None are left out."""
    if dataclasses.is_dataclass(value):
        fields = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
        return {name: encode(own) for name, own, default in fields if own is not None or default is not None}
    if isinstance(value, Mapping):
        return {key: encode(own) for key, own in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [encode(own) for own in cast("Iterable[Any]", value)]
    return value


def refusal(where: str, value: Any, allowed: str) -> DecodeError:
    return DecodeError(f"{where or 'the file'} is {reprlib.repr(value)}; allowed is {allowed}")


def within(where: str, key: str) -> str:
    """The path of a key: `components.unet`, or `files['unet.onnx']` where the key has a dot."""
    if not re.fullmatch(r"[A-Za-z_]\w{0,99}", key, re.ASCII):
        return f"{where}[{reprlib.repr(key)}]"
    return f"{where}.{key}" if where else key


Path = tuple[str | int, ...]  # the place of the value that is decoded, then keys and indices: text only in an error


def _text(path: Path) -> str:
    text = str(path[0])
    for key in path[1:]:
        text = f"{text}[{key}]" if isinstance(key, int) else within(text, key)
    return text


def _decode(kind: Any, value: Any, path: Path) -> Any:
    if not _fits(kind, value):
        raise refusal(_text(path), value, _allowed(kind))
    if isinstance(kind, type) and kind in NAMES:
        if kind in _PLAIN and not _PLAIN[kind](value):
            raise refusal(_text(path), value, NAMES[kind])
        return float(value) if kind is float else value
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _ruled(args[0], cast("tuple[Rule, ...]", args[1:]), value, path)
    if origin in (Union, types.UnionType):
        return _decode(next(member for member in args if _fits(member, value)), value, path)
    if origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_decode(own, item, (*path, i)) for i, (own, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is Mapping:
        return {_decode(args[0], k, (*path, k)): _decode(args[1], v, (*path, k)) for k, v in value.items()}
    return _dataclass(cast(type[Any], kind), value, path)


def _ruled(kind: Any, rules: tuple[Rule, ...], value: Any, path: Path) -> Any:
    decoded = _decode(kind, value, path)
    for rule in rules:
        if not rule.test(decoded):
            raise refusal(_text(path), value, rule.allowed)
    return decoded


def _dataclass(kind: type[Any], value: Mapping[str, Any], path: Path) -> Any:
    hints = _hints(kind)
    for key in value:
        if key not in hints:
            where = _text(path)
            raise DecodeError(f"{within(where, key)} is unknown; {where or 'the file'} has {', '.join(hints)}")
    for f in dataclasses.fields(kind):
        if f.name not in value and f.default is dataclasses.MISSING:
            raise DecodeError(f"{_text((*path, f.name))} is missing; allowed is {_allowed(hints[f.name])}")
    return kind(**{key: _decode(hints[key], own, (*path, key)) for key, own in value.items()})


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value has the JSON type of a kind."""
    if isinstance(kind, type) and kind in NAMES:
        if kind is float:
            return type(value) in (int, float)  # not bool
        return kind is Json or type(value) is kind
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(args[0], value)
    if origin in (Union, types.UnionType):
        return any(_fits(member, value) for member in args)
    if origin is tuple:
        return isinstance(value, list) and (args[-1] is Ellipsis or len(cast("list[Any]", value)) == len(args))
    return isinstance(value, dict)  # a dataclass or a Mapping


def _allowed(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return cast(Rule, args[-1]).allowed
    if origin in (Union, types.UnionType):
        return " or ".join(map(_allowed, args))
    if origin is tuple:
        return f"a list of {_allowed(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)} numbers"
    if origin is Mapping:
        return f"an object with {_allowed(args[1])} for each name"
    return NAMES[kind] if kind in NAMES else f"an object with {', '.join(_hints(kind))}"


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number larger than any float
        return False


def _is_text(text: str) -> bool:
    """No control characters, which could write on a terminal, and no half of a surrogate pair, which is no text."""
    return not re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", text)


def _is_json(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (dict, list)):
        entries = cast("dict[str, Any] | list[Any]", value)
        items = [*entries, *entries.values()] if isinstance(entries, dict) else entries
        return depth < DEEPEST and all(_is_json(item, depth + 1) for item in items)
    if isinstance(value, str):
        return _is_text(value)
    return value is None or _is_finite(value)


_PLAIN: Mapping[Any, Callable[[Any], bool]] = {float: _is_finite, str: _is_text, Json: _is_json}
