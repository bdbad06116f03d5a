"""What a tune ends with: the presets that it chooses, a table of the frontier, and a plot of it.

exact      fp32, every call full and guided: the fastest that is as near to the reference as the bundle's defaults
balanced   the fastest that reaches --floor; or the nearest to the reference within --budget
fast       the fastest with twice the error that the floor allows, 6 dB less; or the nearest in half of the budget
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdopt.bench.svg import Mark, scatter
from sdopt.bench.tables import markdown
from sdopt.bench.tune_search import Point, frontier
from sdopt.bundle.presets import Preset
from sdopt.dataclass import dataclass

LEVERS = ("guidance_interval", "cache_interval")  # with which a picture is not that of any number of steps
FAST_LESS = 6.0  # dB
FAST_PART = 0.5  # of the seconds
NAMES = ("exact", "balanced", "fast")


@dataclass(frozen=True)
class Choice:
    """What the caller accepts: at least `floor` dB, or at most `budget` seconds; one of the two."""

    floor: float | None = None
    budget: float | None = None

    def __str__(self) -> str:
        return f"at least {self.floor:g} dB" if self.floor is not None else f"at most {self.budget:g} s"


def presets(points: Sequence[Point], default: Point, choice: Choice) -> dict[str, Point]:
    """The points that become presets, by name. A name for which no point is good enough is not there."""
    plain = [p for p in points if p.candidate.precision == "fp32" and not set(LEVERS) & set(p.candidate.keywords)]
    found = {
        "exact": _fastest([default, *plain], default.psnr_db),
        "balanced": _chosen(points, choice),
        "fast": _chosen(points, looser(choice)),
    }
    return {name: one for name, one in found.items() if one is not None}


def looser(choice: Choice) -> Choice:
    """What is enough for `fast`."""
    if choice.floor is not None:
        return Choice(floor=choice.floor - FAST_LESS)
    assert choice.budget is not None
    return Choice(budget=choice.budget * FAST_PART)


def _chosen(points: Sequence[Point], choice: Choice) -> Point | None:
    if choice.floor is not None:
        return _fastest(points, choice.floor)
    assert choice.budget is not None
    within = [p for p in points if p.seconds <= choice.budget]
    return max(within, key=lambda p: p.psnr_db, default=None)


def _fastest(points: Sequence[Point], floor: float) -> Point | None:
    return min((p for p in points if p.psnr_db >= floor), key=lambda p: p.seconds, default=None)


def preset_of(point: Point, reference: str, machine: str) -> Preset:
    """A measured point as a preset of the bundle."""
    one = point.candidate
    return Preset(
        one.backend, one.precision, one.keywords, round(point.seconds, 4), round(point.psnr_db, 2),
        round(point.ssim, 4), reference, machine,
    )  # fmt: skip


def table(points: Sequence[Point], default: Point, chosen: Mapping[str, Point]) -> str:
    """The frontier, the defaults and the presets in Markdown, the fastest first."""
    shown = {p.candidate.key: p for p in (*frontier(points), default, *chosen.values())}
    rows = [["preset", "seconds", "faster", "dB", "SSIM", "settings"]]
    for one in sorted(shown.values(), key=lambda p: p.seconds):
        factor = default.seconds / one.seconds
        name = ", ".join(names_of(one, default, chosen))
        numbers = [f"{one.seconds:.3g}", f"{factor:.2f}x", f"{one.psnr_db:.1f}", f"{one.ssim:.3f}"]
        rows.append([name, *numbers, str(one.candidate)])
    return markdown(rows)


def names_of(point: Point, default: Point, chosen: Mapping[str, Point]) -> list[str]:
    """What a point is called: presets, and "default" for the settings of a call without keywords."""
    named = {**chosen, "default": default}
    return [name for name, one in named.items() if one.candidate.key == point.candidate.key]


def plot(title: str, points: Sequence[Point], default: Point, chosen: Mapping[str, Point]) -> str:
    """Time against fidelity as SVG: every point that was measured to the end, the frontier, the names."""
    named = {p.candidate.key: p for p in (default, *chosen.values())}
    marks = [
        Mark(", ".join(names_of(one, default, chosen)), (one.seconds, one.psnr_db), 1 if one is default else 2)
        for one in named.values()
    ]
    cloud = [(p.seconds, p.psnr_db) for p in points]
    curve = [(p.seconds, p.psnr_db) for p in frontier(points)]
    return scatter(title, "seconds of a picture", "PSNR to the reference, dB", cloud, curve, marks)


def as_json(points: Mapping[str, Point]) -> dict[str, Any]:
    """The chosen points for a record."""
    return {
        name: {
            "backend": p.candidate.backend,
            "precision": p.candidate.precision,
            "keywords": dict(p.candidate.keywords),
            "pictures": p.pictures,
            "seconds": p.seconds,
            "psnr_db": p.psnr_db,
            "ssim": p.ssim,
        }
        for name, p in points.items()
    }
