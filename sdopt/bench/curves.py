"""Cost curves: the seconds for a picture against steps, pixels or images.

The results of one curve differ only in the quantity on its horizontal axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sdopt.bench.record import Result, SideResult
from sdopt.bench.sides import OURS
from sdopt.bench.stats import paired_ratio, summary
from sdopt.bench.svg import Curve, lines
from sdopt.dataclass import dataclass

AXES = {"steps": "a picture against steps", "pixels": "a picture against pixels", "images": "a batch against images"}


@dataclass(frozen=True)
class Cost:
    """Results that differ only in the quantity of one axis, as pairs (x, result) in ascending order of x."""

    axis: str
    model: str
    points: Sequence[tuple[int, Result]]

    @property
    def title(self) -> str:
        return f"{self.model}: {AXES[self.axis]}"

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that made a picture at more than one x. Pictures of sdopt below the parity floor do not count."""
        names = [side["name"] for _, result in self.points for side in _shown(result)]
        return tuple(dict.fromkeys(name for name in names if names.count(name) > 1))

    def svg(self) -> str:
        """The plot of its curves."""
        curves: list[Curve] = []
        for colour, name in enumerate(self.sides):
            points = [(x, summary(side["seconds"]["picture"]).median) for x, side in self._of(name)]
            curves.append(Curve(name, points, colour))
        return lines(self.title, self.axis, "seconds", curves)

    def rows(self) -> list[list[str]]:
        """The table of its points: the seconds of every side, and how many times as fast sdopt is."""
        others = [name for name in self.sides if name != OURS] if OURS in self.sides else []
        head = [self.axis, *(f"{name}, s" for name in self.sides), *(f"faster than {name} by" for name in others)]
        sides_by_x = {name: dict(self._of(name)) for name in self.sides}
        rows = [head]
        for x, _ in self.points:
            sides_at_x = {name: sides.get(x) for name, sides in sides_by_x.items()}
            ratios = [_ratio(sides_at_x[OURS], sides_at_x[name]) for name in others]
            rows.append([str(x), *(_seconds(side) for side in sides_at_x.values()), *ratios])
        return rows

    def _of(self, name: str) -> Iterator[tuple[int, SideResult]]:
        """The pairs (x, side) of one side."""
        for x, result in self.points:
            for side in _shown(result):
                if side["name"] == name:
                    yield x, side


def costs(results: Sequence[Result], axis: str) -> list[Cost]:
    """The curves along an axis: each is made of two or more results that differ in its quantity alone."""
    curves: dict[tuple[Any, ...], dict[int, Result]] = {}  # the results by everything that has to be equal, then by x
    for result in results:
        case = result["case"]
        quantities: dict[str, int] = {
            "steps": case["steps"],
            "pixels": case["width"] * case["height"],
            "images": case["batch"],
        }
        x = quantities.pop(axis)
        settings = [case[name] for name in ("guidance", "backend", "precision", "memory")]
        key = (case["model"], *quantities.values(), *settings, result["device"], result["threads"])
        curves.setdefault(key, {})[x] = result
    candidates = [Cost(axis, key[0], sorted(points.items())) for key, points in curves.items()]
    return [cost for cost in candidates if cost.sides]


def _shown(result: Result) -> list[SideResult]:
    """The sides of a result that made a picture, but sdopt only if its speed may be quoted."""
    measured = [side for side in result["sides"] if side["failed"] is None]
    return [side for side in measured if side["quotable"] or side["kind"] != "sdopt"]


def _seconds(side: SideResult | None) -> str:
    return "-" if side is None else f"{summary(side['seconds']['picture']).median:.3g}"


def _ratio(ours: SideResult | None, other: SideResult | None) -> str:
    if ours is None or other is None:
        return "-"
    return str(paired_ratio(other["seconds"]["picture"], ours["seconds"]["picture"]))
