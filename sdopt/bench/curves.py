"""Cost curves: the picture's seconds against steps, pixels or images, from results that differ in nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdopt.bench.sides import OURS
from sdopt.bench.stats import paired_ratio, summary
from sdopt.bench.svg import Curve, lines

AXES = {"steps": "a picture against steps", "pixels": "a picture against pixels", "images": "a batch against images"}
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """One family of results along an axis: (x, result) in ascending order of x."""

    axis: str
    model: str
    points: Sequence[tuple[int, Result]]

    @property
    def title(self) -> str:
        return f"{self.model}: {AXES[self.axis]}"

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that have a picture at more than one x; sdopt's counts only where its parity allows."""
        names = [side["name"] for _, result in self.points for side in _shown(result)]
        return tuple(dict.fromkeys(name for name in names if names.count(name) > 1))

    def svg(self) -> str:
        """Its plot."""
        curves = [
            Curve(name, [(x, summary(s["seconds"]["picture"]).median) for x, s in self._of(name)], colour)
            for colour, name in enumerate(self.sides)
        ]
        return lines(self.title, self.axis, "seconds", curves)

    def rows(self) -> list[list[str]]:
        """Its table: seconds of every side, and how many times as fast sdopt is, where its parity lets it be quoted."""
        others = [name for name in self.sides if name != OURS] if OURS in self.sides else []
        head = [self.axis, *(f"{name}, s" for name in self.sides), *(f"faster than {name} by" for name in others)]
        found = {name: dict(self._of(name)) for name in self.sides}
        rows = [head]
        for x, _ in self.points:
            here = {name: sides.get(x) for name, sides in found.items()}
            ratios = [_ratio(here[OURS], here[name]) for name in others]
            rows.append([str(x), *(_seconds(side) for side in here.values()), *ratios])
        return rows

    def _of(self, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for x, result in self.points:
            yield from ((x, side) for side in _shown(result) if side["name"] == name)


def costs(results: Sequence[Result], axis: str) -> list[Cost]:
    """What can be drawn along an axis: two or more results that differ in it alone."""
    found: dict[tuple[Any, ...], dict[int, Result]] = {}
    for result in results:
        case = result["case"]
        at: dict[str, int] = {"steps": case["steps"], "pixels": case["width"] * case["height"], "images": case["batch"]}
        x, how = at.pop(axis), [case[name] for name in ("guidance", "backend", "precision", "memory")]
        found.setdefault((case["model"], *at.values(), *how, result["device"], result["threads"]), {})[x] = result
    drawn = [Cost(axis, model, sorted(points.items())) for (model, *_), points in found.items()]
    return [cost for cost in drawn if cost.sides]


def _shown(result: Result) -> list[Mapping[str, Any]]:
    """The sides of a result that made a picture; sdopt only with a parity that may be quoted."""
    return [s for s in result["sides"] if s["failed"] is None and (s["quotable"] or s["kind"] != "sdopt")]


def _seconds(side: Mapping[str, Any] | None) -> str:
    return "-" if side is None else f"{summary(side['seconds']['picture']).median:.3g}"


def _ratio(ours: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    if ours is None or other is None:
        return "-"
    return str(paired_ratio(other["seconds"]["picture"], ours["seconds"]["picture"]))
