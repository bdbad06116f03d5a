"""Everything that sdopt raises on purpose.

    SdoptError                 catch this one to catch them all         exit code 1
    |- UsageError              an argument is wrong (a ValueError too)            2
    |- BundleError             a bundle is missing, damaged or not ours           3
    |- CheckpointError         a checkpoint cannot be exported, and why           3
    |- BackendError            an engine library or a device is missing           4
    |- ParityError             an exported graph is not the model it came from    5
    `- NumericsError           NaN or infinity where a picture should be          1

Every message finishes the sentence: what was given, what is allowed, what to type.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Iterable
from typing import Any

SHOWN = 80  # characters of a value in an error message
LONG_WORD = re.compile(r"\S{500,}")


def cut(message: str) -> str:
    """A message without words that nobody reads: a path of thousands of characters is cut in its middle."""
    return LONG_WORD.sub(lambda word: f"{word[0][:200]}...{word[0][-100:]}", message)


class SdoptError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __str__(self) -> str:
        return cut(super().__str__())


class UsageError(SdoptError, ValueError):
    """An argument or option has a value that is not allowed; `param` is its name, where the error is about one."""

    exit_code = 2

    def __init__(self, message: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BundleError(SdoptError):
    """A bundle is incomplete, damaged, unsafe to open or from an unknown format version."""

    exit_code = 3


class CheckpointError(SdoptError):
    """A source checkpoint is refused by the exporter."""

    exit_code = 3


class BackendError(SdoptError):
    """The library or the device that an engine needs is not there."""

    exit_code = 4


class ParityError(SdoptError):
    """An engine's output is further from PyTorch's than the floor allows."""

    exit_code = 5


class NumericsError(SdoptError):
    """A tensor holds NaN or infinity; the message names the component and the step."""


def choices(given: object, allowed: Iterable[str]) -> str:
    """`allowed` as one string, nearest to `given` first, for the end of an error message."""
    import difflib  # late: only an error needs it

    names, word = list(allowed), given.lower() if isinstance(given, str) else ""
    near = difflib.get_close_matches(word, [n.lower() for n in names], n=len(names), cutoff=0.0)
    order = {n: i for i, n in enumerate(near)}
    return ", ".join(sorted(names, key=lambda n: order.get(n.lower(), len(names))))


def refuse_other(name: str, value: object, kind: type[Any], allowed: str) -> None:
    """Raises: UsageError unless `value` is a `kind`; True and False are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{name} = {shown(value)}; allowed {allowed}", name)


def refuse_no_switch(**switches: object) -> None:
    """Raises: UsageError for a switch that is neither True nor False."""
    for name, value in switches.items():
        refuse_other(name, value, bool, "are True and False")


def refuse_no_path(name: str, value: object) -> None:
    """Raises: UsageError unless `value` can be the name of a file: text or a path, without a null byte."""
    try:
        path = os.fspath(value)  # pyright: ignore[reportArgumentType, reportUnknownVariableType, reportCallIssue]
        if not isinstance(path, str):
            raise TypeError("it is no text")
        if not path:
            raise ValueError("it is empty")
        if b"\0" in os.fsencode(path):  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
            raise ValueError("it has a null byte")
    except Exception as error:  # any object may be given, and may raise anything when it is looked at
        raise UsageError(f"{name}: {shown(value)} is no path: {error}", name) from error


class _Short(reprlib.Repr):
    """repr, cut to one line; any object has one."""

    def repr_instance(self, x: Any, level: int) -> str:
        if hasattr(x, "dtype") and hasattr(x, "shape") and getattr(x, "ndim", 0):
            return f"{type(x).__name__} {x.dtype} {tuple(x.shape)}"
        return super().repr_instance(x, level)

    def repr_int(self, x: int, level: int) -> str:
        digits = int(x.bit_length() * math.log10(2))
        return repr(x) if digits < SHOWN // 2 else f"{type(x).__name__} of about {digits} digits"

    def repr_ndarray(self, x: Any, level: int) -> str:
        return f"{x.dtype} {tuple(x.shape)}" if x.ndim else repr(x)


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = SHOWN
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 6


def shown(value: Any) -> str:
    """A value in an error message: short, and without fail."""
    try:
        return _SHORT.repr(value)
    except Exception:
        return f"a {type(value).__name__}"


def install(extras: str) -> str:
    """The command that installs extras, e.g. "cpu,export": from an index, and in a clone of the repository."""
    return f'pip install "sdopt[{extras}]" (in a clone of sdopt: pip install ".[{extras}]")'
