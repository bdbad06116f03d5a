"""Where the replicas of a Ray cluster tell how they are, and the front reads it: an actor with a name.

A front cannot ask a certain replica of Ray Serve, so each replica tells of itself every second. What a replica says
first, the digests of its bundles, is what the others must have: else a picture would depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdopt.cluster import NAMESPACE
from sdopt.errors import SdoptError
from sdopt.serve.worker import Beat


@dataclass(frozen=True)
class Report:
    """What a replica says of itself. `models`: what clients may know of each, by name."""

    models: Mapping[str, Any]
    beat: Beat


@dataclass(frozen=True)
class Reading:
    """`reports`: the newest one of each replica, and the seconds since then. `error`: why the newest cannot begin."""

    reports: Mapping[str, tuple[float, Report]] = field(default_factory=dict[str, tuple[float, Report]])
    error: SdoptError | None = None


class Board:
    """The actor. Replicas are known by a name."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, Report]] = {}
        self._digests: Mapping[str, str] | None = None
        self._error: SdoptError | None = None

    def agree(self, digests: Mapping[str, str]) -> Mapping[str, str]:
        """The digests of the bundles, by name, that all replicas must have: those of the first one."""
        self._digests = digests if self._digests is None else self._digests
        return self._digests

    def tell(self, replica: str, report: Report) -> None:
        if replica not in self._reports:  # one that could begin
            self._error = None
        self._reports[replica] = time.monotonic(), report

    def leave(self, replica: str) -> None:
        """A replica has ended."""
        self._reports.pop(replica, None)

    def unable(self, error: SdoptError) -> None:
        """A replica cannot begin."""
        self._error = error

    def read(self) -> Reading:
        now = time.monotonic()
        reports = {name: (now - heard, report) for name, (heard, report) in self._reports.items()}
        return Reading(reports, self._error)


def put_up(ray: Any, name: str) -> Any:
    """The board of this name, which is there as long as the process that made it. Raises: what Ray raises."""
    return ray.remote(Board).options(name=name, namespace=NAMESPACE, get_if_exists=True, num_cpus=0).remote()


def board_of(ray: Any, name: str) -> Any | None:
    """The board of this name, or None while there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
