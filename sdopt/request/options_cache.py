"""The keywords of a request that trade fidelity for time: a preset, and the feature cache."""

# no `from __future__ import annotations`: `keywords` reads these, and as text each would be compiled first

from collections.abc import Sequence
from typing import Annotated, TypedDict

from sdopt.request.cache import DEPTH
from sdopt.request.keyword import Flag, Keyword
from sdopt.request.kinds import MAX_LIST, Integer, Several, Word


class CacheOptions(TypedDict, total=False):
    """A preset; which calls are full ones, and how many layers the others make anew."""

    preset: Annotated[
        str | None,
        Keyword(
            "settings of the bundle that `sdopt tune` measured, e.g. exact, balanced or fast; what is given beside it "
            "takes precedence",
            Word('"fast"'),
            otherwise="none",
            record="never",
        ),
    ]
    cache_interval: Annotated[
        int | None,
        Keyword(
            "every so many calls of the UNet one is full; the others take its deep features and make only the last "
            "layers: sooner, and not the same picture",
            Integer(1, MAX_LIST, "2"),
            1,
            flag=Flag(metavar="CALLS"),
        ),
    ]
    cache_schedule: Annotated[
        Sequence[int] | None,
        Keyword(
            "in place of an interval, which calls are full ones; the first, call 0, always is",
            Several(Integer(0, MAX_LIST), "[0, 1, 4, 9]"),
            otherwise="by the interval",
            flag=Flag(metavar="CALL"),
        ),
    ]
    cache_depth: Annotated[
        int | None,
        Keyword(
            "how many of the last layers the other calls make; `sdopt build` makes the engines of each depth",
            Integer(1, 64, "2"),
            DEPTH,
            flag=Flag(metavar="LAYERS"),
        ),
    ]
