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

import difflib
from collections.abc import Iterable


class SdoptError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns for it."""

    exit_code = 1


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


def choices(given: str, allowed: Iterable[str]) -> str:
    """`allowed` as one string, nearest to `given` first, for the end of an error message."""
    names = list(allowed)
    near = difflib.get_close_matches(given.lower(), [n.lower() for n in names], n=len(names), cutoff=0.0)
    order = {n: i for i, n in enumerate(near)}
    return ", ".join(sorted(names, key=lambda n: order.get(n.lower(), len(names))))
