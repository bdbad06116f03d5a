"""JSON into frozen dataclasses, by their annotations, and back.

    @dataclass(frozen=True)
    class Latents:
        channels: Positive                          # an Annotated type: a type with a Rule
        scaling_factor: float | tuple[float, ...]

    decode(Latents, {"channels": 0}, "latents")     # DecodeError: latents.channels is 0; allowed is a whole number ...

An annotation may be bool, int, float, str, Lines, None, Json, a subclass of Text, a dataclass, `tuple[T, ...]`, a tuple
of fixed length, `Mapping[K, V]`, a union of these that differ in their JSON type, and any of them with rules in
`Annotated`. A field with a default may be left out; any other key is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from sdopt.dataclass import dataclass
from sdopt.errors import SdoptError

T = TypeVar("T")
DEEPEST = 8  # lists and objects inside one another, where any JSON is allowed


class DecodeError(ValueError):
    """A value is not what its field takes. The text names the field, the value and what is allowed."""


@dataclass(frozen=True)
class Rule:
    """What a type allows beyond its JSON type; `allowed` ends the sentence "allowed is ..."."""

    allowed: str
    test: Callable[[Any], bool]


def integer(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda value: low <= value <= high)


def between(low: float, high: float) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda value: low <= value <= high)


def one_of(*words: str) -> Rule:
    return Rule(f"one of {', '.join(words)}", lambda value: value in words)


def matching(pattern: str, allowed: str) -> Rule:
    return Rule(allowed, lambda value: re.fullmatch(pattern, value) is not None)


if TYPE_CHECKING:
    Json = Any
    Lines = str
else:

    class Json:
        """An annotation for any JSON value that is not deeper than DEEPEST."""

    class Lines:
        """An annotation for text that may have several lines, or any other control character."""


class Text:
    """A value that JSON holds as text: `parse` reads it, `str` writes it."""

    @classmethod
    def parse(cls, text: str) -> Any:
        """Raises: SdoptError for another text."""
        raise NotImplementedError


def decode(kind: type[T] | Any, value: Any, where: str = "") -> T:
    """`value`, as json.loads gives it, as a `kind`; `where` is its path in the file.

    Raises: DecodeError that names the path, the value and what is allowed.
    """
    return cast(T, _type(kind).decode(value, (where,)))


def encode(value: Any) -> Any:
    """What json.dumps takes of a dataclass; optional fields that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Text):
        fields = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
        return {name: encode(own) for name, own, default in fields if own is not None or default is not None}
    if isinstance(value, Text):
        return str(value)
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


class _Type:
    """An annotation, made ready: the JSON values that it takes, what they become, and the words for them."""

    def __init__(self, fits: Callable[[Any], bool], read: Callable[[Any, Path], Any], allowed: str) -> None:
        self.fits, self.read, self.allowed = fits, read, allowed

    def decode(self, value: Any, path: Path) -> Any:
        if not self.fits(value):
            raise refusal(_text(path), value, self.allowed)
        return self.read(value, path)


@functools.cache
def _type(kind: Any) -> _Type:
    if kind in PLAIN:
        return _plain(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _ruled(_type(args[0]), args[1:])
    if origin in (Union, types.UnionType):
        return _union([_type(member) for member in args])
    if origin is tuple:
        return _list(_type(args[0])) if args[-1] is Ellipsis else _fixed([_type(own) for own in args])
    if origin is Mapping:
        return _mapping(_type(args[0]), _type(args[1]))
    return _parsed(kind) if issubclass(kind, Text) else _object(kind)


def _plain(kind: Any) -> _Type:
    fits, test, allowed = PLAIN[kind]

    def read(value: Any, path: Path) -> Any:
        if not test(value):
            raise refusal(_text(path), value, allowed)
        return float(value) if kind is float else value

    return _Type(fits, read, allowed)


def _ruled(inner: _Type, rules: tuple[Rule, ...]) -> _Type:
    def read(value: Any, path: Path) -> Any:
        decoded = inner.read(value, path)
        for rule in rules:
            if not rule.test(decoded):
                raise refusal(_text(path), value, rule.allowed)
        return decoded

    return _Type(inner.fits, read, rules[-1].allowed)


def _union(members: list[_Type]) -> _Type:
    def read(value: Any, path: Path) -> Any:
        return next(member for member in members if member.fits(value)).read(value, path)

    def fits(value: Any) -> bool:
        return any(member.fits(value) for member in members)

    return _Type(fits, read, " or ".join(member.allowed for member in members))


def _list(inner: _Type) -> _Type:
    def read(value: Any, path: Path) -> Any:
        return tuple([inner.decode(item, (*path, i)) for i, item in enumerate(value)])

    return _Type(lambda value: isinstance(value, list), read, f"a list of {inner.allowed}")


def _fixed(inner: list[_Type]) -> _Type:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and len(cast("list[Any]", value)) == len(inner)

    def read(value: Any, path: Path) -> Any:
        return tuple([own.decode(item, (*path, i)) for i, (own, item) in enumerate(zip(inner, value, strict=True))])

    return _Type(fits, read, f"a list of {len(inner)} numbers")


def _mapping(key: _Type, inner: _Type) -> _Type:
    def read(value: Any, path: Path) -> Any:
        return {key.decode(k, (*path, k)): inner.decode(own, (*path, k)) for k, own in value.items()}

    return _Type(_is_object, read, f"an object with {inner.allowed} for each name")


def _parsed(kind: type[Text]) -> _Type:
    def read(value: Any, path: Path) -> Any:
        try:
            return kind.parse(value)
        except SdoptError as error:
            raise DecodeError(f"{_text(path)}: {error}") from error

    return _Type(lambda value: isinstance(value, str), read, f"the text of a {kind.__name__.lower()}")


def _object(kind: type[Any]) -> _Type:
    types_of = {name: _type(own) for name, own in _annotations(kind).items()}
    needed = [f.name for f in dataclasses.fields(kind) if f.default is MISSING and f.default_factory is MISSING]

    def read(value: Any, path: Path) -> Any:
        for key in value:
            if key not in types_of:
                where = _text(path)
                raise DecodeError(f"{within(where, key)} is unknown; {where or 'the file'} has {', '.join(types_of)}")
        for name in needed:
            if name not in value:
                raise DecodeError(f"{_text((*path, name))} is missing; allowed is {types_of[name].allowed}")
        return kind(**{name: types_of[name].decode(own, (*path, name)) for name, own in value.items()})

    return _Type(_is_object, read, f"an object with {', '.join(types_of)}")


def _annotations(kind: type[Any]) -> Mapping[str, Any]:
    """The fields of a dataclass with their annotations; as text, each of them is compiled first, which takes time."""
    own: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(kind)}
    if any(isinstance(annotation, str) for annotation in own.values()):
        return get_type_hints(kind, include_extras=True)
    return own


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # not bool


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


def _always(value: Any) -> bool:
    return True


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


# annotation -> (whether a JSON value is of its type, whether it is allowed, the words for it)
PLAIN: Mapping[Any, tuple[Callable[[Any], bool], Callable[[Any], bool], str]] = {
    bool: (_is_a(bool), _always, "true or false"),
    int: (_is_a(int), _always, "a whole number"),
    float: (_is_number, _is_finite, "a finite number"),
    str: (_is_a(str), _is_text, "text without control characters"),
    Lines: (_is_a(str), _always, "text"),
    type(None): (_is_a(type(None)), _always, "null"),
    Json: (_always, _is_json, f"JSON with finite numbers, at most {DEEPEST} lists or objects inside one another"),
}
