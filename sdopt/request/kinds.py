"""The kinds of values that keywords have: what is allowed, how a value is read, how a form or a flag describes it.

A kind reads a value into plain Python or NumPy. It raises ValueError for a value that it does not allow; `Keyword`
makes a UsageError of it, with the keyword's name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np

from sdopt.dataclass import dataclass

MAX_IMAGES = 64
MAX_SIZE = 1 << 14  # pixels a side
MAX_PIXELS = 64_000_000  # of one picture
MAX_LIST = 10_000  # numbers in one list
MAX_PROMPT_BYTES = 8192
MAX_INTEGER = 1 << 31
Schema = dict[str, Any]  # of JSON Schema's words


class PartError(ValueError):
    """One item of a list is wrong, and not the list."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part


def read_part(kind: Kind, part: Any) -> Any:
    """An item of a list, read. Raises: PartError for one that the kind does not allow."""
    try:
        return kind.read(part)
    except Exception as error:
        raise PartError(part) from error


class Kind:
    """One kind of value.

    `example` is what one may type for it in Python.
    """

    example: str

    def allowed(self) -> str:
        """What a value may be, as it ends the sentence "allowed ..."."""
        raise NotImplementedError

    def read(self, value: Any) -> Any:
        """The value in plain Python or NumPy. Raises: ValueError, or whatever a strange object raises when read."""
        raise NotImplementedError

    def schema(self) -> Schema:
        """The value in the words of JSON Schema."""
        raise NotImplementedError

    def flag(self) -> dict[str, Any]:
        """What argparse needs to know to read it from a command line."""
        return {"type": str}

    def from_flag(self, value: Any) -> Any:
        """The keyword's value, from what argparse read."""
        return value


@dataclass(frozen=True)
class Integer(Kind):
    low: int
    high: int = MAX_INTEGER
    example: str = "1"

    def allowed(self) -> str:
        return f"are whole numbers from {self.low} to {self.high}"

    def read(self, value: Any) -> int:
        if isinstance(value, (bool, np.bool_)) or getattr(value, "ndim", 0):
            raise ValueError
        number = operator.index(value)  # NumPy's integers are welcome
        if not self.low <= number <= self.high:
            raise ValueError
        return int(number)

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def flag(self) -> dict[str, Any]:
        return {"type": int}


@dataclass(frozen=True)
class Number(Kind):
    """A finite number; `between` leaves out both ends."""

    low: float
    high: float
    noun: str = "numbers"
    unit: str = ""
    between: bool = False
    example: str = "0.5"

    def allowed(self) -> str:
        if self.unit:
            return f"are {self.low:g} to {self.high:g} {self.unit}"
        ends = "above {:g} and below {:g}" if self.between else "from {:g} to {:g}"
        return f"are {self.noun} {ends.format(self.low, self.high)}"

    def read(self, value: Any) -> float:
        if isinstance(value, (bool, np.bool_, str, bytes)) or getattr(value, "ndim", 0) or np.iscomplexobj(value):
            raise ValueError
        if not hasattr(value, "__float__") or getattr(getattr(value, "dtype", None), "kind", "f") not in "fiu":
            raise ValueError
        number = float(value)
        inside = self.low < number < self.high if self.between else self.low <= number <= self.high
        if not math.isfinite(number) or not inside:
            raise ValueError
        return number

    def schema(self) -> Schema:
        low, high = ("exclusiveMinimum", "exclusiveMaximum") if self.between else ("minimum", "maximum")
        return {"type": "number", low: self.low, high: self.high}

    def flag(self) -> dict[str, Any]:
        return {"type": float}


FRACTION = Number(0, 1)


@dataclass(frozen=True)
class Switch(Kind):
    example: str = "True"

    def allowed(self) -> str:
        return "are True and False"

    def read(self, value: Any) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError
        return bool(cast(Any, value))

    def schema(self) -> Schema:
        return {"type": "boolean"}

    def flag(self) -> dict[str, Any]:
        return {"action": "store_true"}


def text(value: Any) -> str:
    """`value` as a plain string. Raises: ValueError if it is none, is too long, or is not Unicode."""
    if not isinstance(value, str):
        raise ValueError
    plain = str.__str__(value)
    if len(plain.encode("utf-8")) > MAX_PROMPT_BYTES:  # UnicodeEncodeError, a ValueError, for a lone surrogate
        raise ValueError(f"{len(plain)} characters; allowed are {MAX_PROMPT_BYTES} bytes")
    return plain


@dataclass(frozen=True)
class Word(Kind):
    """A short text without spaces around it."""

    example: str

    def allowed(self) -> str:
        return "are texts without spaces around them, and without control characters"

    def read(self, value: Any) -> str:
        word = text(value)
        if not word or word != word.strip() or not word.isprintable():
            raise ValueError
        return word

    def schema(self) -> Schema:
        return {"type": "string", "minLength": 1}


@dataclass(frozen=True)
class Texts(Kind):
    """A prompt, or one for each picture."""

    example: str = '"a red apple"'

    def allowed(self) -> str:
        return f"are a text or a list of texts, in Unicode, each up to {MAX_PROMPT_BYTES} bytes"

    def read(self, value: Any) -> str | list[str]:
        if isinstance(value, str):
            return text(value)
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError
        return [text(one) for one in cast(Sequence[Any], value)]

    def schema(self) -> Schema:
        one = {"type": "string", "maxLength": MAX_PROMPT_BYTES}
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_IMAGES}]}


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few names."""

    names: tuple[str, ...]
    example: str

    def allowed(self) -> str:
        return f"are {', '.join(self.names)}"

    def read(self, value: Any) -> str:
        name = text(value)
        if name not in self.names:
            raise ValueError
        return name

    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.names)}


@dataclass(frozen=True)
class Name(Kind):
    """A name out of a long list; `find` raises UsageError with those that come near."""

    find: Callable[[str], object]
    names: str
    example: str

    def allowed(self) -> str:
        return f"are {self.names}"

    def read(self, value: Any) -> str:
        name = text(value)
        self.find(name)
        return name

    def schema(self) -> Schema:
        return {"type": "string"}


def items(value: Any) -> list[Any]:
    """The items of a list, a tuple, a range or a flat array. Raises: ValueError if it is none of these."""
    if getattr(value, "ndim", 0) == 1 and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)) or not 0 < len(cast(Sequence[Any], value)) <= MAX_LIST:
        raise ValueError
    return list(cast(Sequence[Any], value))


@dataclass(frozen=True)
class Several(Kind):
    """A list of values of one kind."""

    of: Kind
    example: str

    def allowed(self) -> str:
        return f"is a list of {self.of.allowed().removeprefix('are ')}"

    def read(self, value: Any) -> list[Any]:
        return [read_part(self.of, one) for one in items(value)]

    def schema(self) -> Schema:
        return {"type": "array", "items": self.of.schema(), "minItems": 1, "maxItems": MAX_LIST}

    def flag(self) -> dict[str, Any]:
        return {**self.of.flag(), "nargs": "+"}


@dataclass(frozen=True)
class OneOrMore(Kind):
    """One value, or a list of them; a flag takes one."""

    of: Kind
    example: str

    def allowed(self) -> str:
        return f"{self.of.allowed()}, or a list of them"

    def read(self, value: Any) -> Any:
        several = isinstance(value, (list, tuple, range)) or getattr(value, "ndim", 0)
        return Several(self.of, self.example).read(value) if several else self.of.read(value)

    def schema(self) -> Schema:
        return {"anyOf": [self.of.schema(), Several(self.of, self.example).schema()]}

    def flag(self) -> dict[str, Any]:
        return self.of.flag()


@dataclass(frozen=True)
class BlockScales(Kind):
    """A number for all blocks of a UNet, or a table of its parts: {"down": 0.5, "up": {"block_0": [0, 1, 0]}}."""

    example: str = '{"up": {"block_0": [0.0, 1.0, 0.0]}}'
    _of: ClassVar[Number] = Number(-100, 100)
    _parts: ClassVar[tuple[str, ...]] = ("down", "mid", "up")

    def allowed(self) -> str:
        return (
            f"{self._of.allowed()}, or tables of them with the keys {', '.join(self._parts)}, where down and up may be "
            "tables with the keys block_0, block_1, ..., and a block may have a list, one for each attention"
        )

    def read(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return self._of.read(value)
        table = cast("Mapping[Any, Any]", value)
        if not table or not set(table) <= set(self._parts):
            raise ValueError
        return {part: self._part(part, given) for part, given in table.items()}

    def _part(self, part: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return self._block(value)
        table = cast("Mapping[Any, Any]", value)
        if part == "mid" or not table or not all(isinstance(name, str) for name in table):
            raise ValueError
        return {str(name): self._block(given) for name, given in table.items()}

    def _block(self, value: Any) -> Any:
        several = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0)
        return [self._of.read(one) for one in items(value)] if several else self._of.read(value)

    def schema(self) -> Schema:
        one = self._of.schema()
        block = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
        blocks = {"anyOf": [*block["anyOf"], {"type": "object", "additionalProperties": block}]}
        parts = {"down": blocks, "mid": block, "up": blocks}
        return {"anyOf": [one, {"type": "object", "properties": parts, "additionalProperties": False}]}

    def flag(self) -> dict[str, Any]:
        return {"type": float}


@dataclass(frozen=True)
class Pair(Kind):
    """Two whole numbers of pixels, the height first."""

    example: str = "(1024, 1024)"
    _of: ClassVar[Integer] = Integer(0)

    def allowed(self) -> str:
        return f"is (height, width), each a whole number from 0 to {MAX_INTEGER}"

    def read(self, value: Any) -> tuple[int, int]:
        first, second = items(value)
        return read_part(self._of, first), read_part(self._of, second)

    def schema(self) -> Schema:
        return {"type": "array", "items": self._of.schema(), "minItems": 2, "maxItems": 2}

    def flag(self) -> dict[str, Any]:
        return {"type": int, "nargs": 2}


@dataclass(frozen=True)
class Interval(Kind):
    """A part of the way: from, to."""

    example: str = "(0.1, 0.8)"
    _of: ClassVar[Number] = Number(0, 1)

    def allowed(self) -> str:
        return "is (from, to), from below to, both from 0 to 1"

    def read(self, value: Any) -> tuple[float, float]:
        first, second = items(value)
        low, high = read_part(self._of, first), read_part(self._of, second)
        if low >= high:
            raise ValueError
        return low, high

    def schema(self) -> Schema:
        return {"type": "array", "items": self._of.schema(), "minItems": 2, "maxItems": 2}

    def flag(self) -> dict[str, Any]:
        return {"type": float, "nargs": 2}
