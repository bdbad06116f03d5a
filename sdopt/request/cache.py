"""The feature cache of a request: which calls of the UNet are full ones, and how deep it is.

    cache_interval=3              calls 0, 3, 6, ... are full
    cache_schedule=[0, 1, 4, 9]   these are full; the first call always is

Ref: Ma et al. 2023, arXiv:2312.00858, sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError

DEPTH = 1  # of a cache, where a request does not say it
BESIDE = {  # what a cache does not run beside
    "control_image": "ControlNets and T2I-Adapters steer the layers that a shallow call leaves out",
    "ip_adapter_image": "IP-Adapters steer the layers that a shallow call leaves out",
    "ip_adapter_image_embeds": "IP-Adapters steer the layers that a shallow call leaves out",
}


@dataclass(frozen=True)
class FeatureCache:
    """`full` [calls]: whether the plan wants a call to be a full one. `depth`: see `sdopt.build.shallow`."""

    depth: int
    full: tuple[bool, ...]


def feature_cache(given: Mapping[str, Any], calls: int) -> FeatureCache | None:
    """The cache of a request of so many calls; None where every call is a full one.

    Raises: UsageError for keywords that do not fit each other, and for a call that there is not.
    """
    interval, schedule = given["cache_interval"], given["cache_schedule"]
    if interval > 1 and schedule is not None:
        raise UsageError("cache_interval and cache_schedule: both say which calls are full; give one", "cache_schedule")
    if schedule is not None and max(schedule) >= calls:
        text = f"cache_schedule: there is no call {max(schedule)}; this request has {calls}, the first is 0"
        raise UsageError(text, "cache_schedule")
    chosen = range(0, calls, interval) if schedule is None else {0, *schedule}
    full = tuple(k in chosen for k in range(calls))
    if all(full):
        return None
    name = "cache_interval" if schedule is None else "cache_schedule"
    for other, reason in BESIDE.items():
        if given[other] is not None:
            raise UsageError(f"{name} and {other}: {reason}; leave out one of the two", name)
    return FeatureCache(given["cache_depth"], full)
