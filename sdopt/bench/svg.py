"""Small plots as SVG: bars with whiskers, and lines. Their colours follow the reader's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, ROW, GAP, TITLE = 760, 190, 120, 24, 34, 44
PLOT_HEIGHT, COLOURS = 300, 6
NUMBERS = 20  # on the horizontal axis, at most
# the same hue for both themes, lighter on a dark ground
STYLE = """
text { font: 13px sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.soft { fill: #59636e }
.axis { stroke: #818b98 }
.grid { stroke: #d1d9e0 }
.whisker { stroke: #1f2328 }
.c0 { --c: #0550ae } .c1 { --c: #bc4c00 } .c2 { --c: #1a7f37 }
.c3 { --c: #8250df } .c4 { --c: #bf3989 } .c5 { --c: #6e7781 }
.bar, .dot, .key { fill: var(--c) }
.line { stroke: var(--c); fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
 text { fill: #f0f6fc }
 .soft { fill: #9198a1 }
 .axis { stroke: #656c76 }
 .grid { stroke: #3d444d }
 .whisker { stroke: #f0f6fc }
 .c0 { --c: #58a6ff } .c1 { --c: #f0883e } .c2 { --c: #56d364 }
 .c3 { --c: #bc8cff } .c4 { --c: #f778ba } .c5 { --c: #9198a1 }
}
"""


@dataclass(frozen=True)
class Bar:
    """One bar: its name, the words behind it, its length, the ends of its whisker, its colour (a number)."""

    name: str
    words: str
    value: float
    low: float
    high: float
    colour: int


def bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], mark: float | None = None) -> str:
    """Groups of horizontal bars, each group on its own scale; `mark` is a value with a line through the group."""
    y, body = TITLE, list[str]()
    for heading, group in groups:
        most = max([b.high for b in group] + ([mark] if mark else []))
        body.append(f'<text x="16" y="{y + 14}" class="soft">{escape(heading)}</text>')
        top, y = y + 22, y + 22
        for bar in group:
            body += _bar(bar, y, most)
            y += ROW
        if mark:
            x = LEFT + mark / most * (WIDTH - LEFT - RIGHT)
            body.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 2}" y2="{y}" class="axis" stroke-dasharray="3 3"/>'
            )
        y += GAP - ROW // 2
    return _document(title, y, body)


def _bar(bar: Bar, y: int, most: float) -> list[str]:
    def at(value: float) -> float:
        return LEFT + value / most * (WIDTH - LEFT - RIGHT)

    middle = y + ROW / 2 - 2
    return [
        f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect x="{LEFT}" y="{y + 2}" width="{at(bar.value) - LEFT:.1f}" height="{ROW - 8}" rx="2" '
        f'class="bar c{bar.colour % COLOURS}"/>',
        f'<line x1="{at(bar.low):.1f}" x2="{at(bar.high):.1f}" y1="{middle}" y2="{middle}" class="whisker"/>',
        f'<text x="{max(at(bar.value), at(bar.high)) + 8:.1f}" y="{y + 15}">{escape(bar.words)}</text>',
    ]


@dataclass(frozen=True)
class Curve:
    """A named line through points (x, y), with its colour (a number)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int


@dataclass(frozen=True)
class _Heights:
    """The vertical axis: the values that are marked on it, from the lowest to the highest, and its scale."""

    marks: Sequence[float]
    scale: Callable[[float], float]

    def fraction(self, value: float) -> float:
        """How high a value lies: 0 at the lowest mark, 1 at the highest."""
        low, high = self.scale(self.marks[0]), self.scale(self.marks[-1])
        return (self.scale(value) - low) / (high - low)


def _from_zero(values: Sequence[float]) -> _Heights:
    step = _step(max(values))
    return _Heights([i * step for i in range(math.ceil(max(values) / step) + 1)], float)


def _decades(values: Sequence[float]) -> _Heights:
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    return _Heights([10.0**power for power in range(low, high + 1)], math.log10)


def lines(title: str, x_label: str, y_label: str, curves: Sequence[Curve], *, decades: bool = False) -> str:
    """Curves with a dot at each point; x begins at zero, and so does y, unless it is marked in powers of ten.

    The names of the curves stand at the left, or at the right where all curves fall.
    """
    points = [p for c in curves for p in c.points]
    heights = (_decades if decades else _from_zero)([y for _, y in points])
    x_most = max(x for x, _ in points) or 1
    width, left = WIDTH - 80 - RIGHT, 80
    names_at = left + 16 + (width - RIGHT if all(c.points[0][1] > c.points[-1][1] for c in curves) else 0)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / x_most * width, TITLE + 16 + (1 - heights.fraction(y)) * PLOT_HEIGHT

    body: list[str] = []
    for i, mark in enumerate(heights.marks):
        (x, y), (end, _) = at(0, mark), at(x_most, mark)
        body.append(f'<line x1="{x:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="{"grid" if i else "axis"}"/>')
        body.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end" class="soft">{mark:g}</text>')
    numbers = sorted({x for x, _ in points})
    for value in numbers[:: math.ceil(len(numbers) / NUMBERS)]:
        x, y = at(value, heights.marks[0])
        body.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" class="soft">{value:g}</text>')
    for i, curve in enumerate(curves):
        placed = [at(*p) for p in sorted(curve.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        body.append(f'<polyline points="{path}" class="line c{curve.colour % COLOURS}"/>')
        body += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot c{curve.colour % COLOURS}"/>' for x, y in placed
        ]
        y = TITLE + 24 + 20 * i
        body.append(f'<rect x="{names_at}" y="{y - 9}" width="10" height="10" class="key c{curve.colour % COLOURS}"/>')
        body.append(f'<text x="{names_at + 16}" y="{y}">{escape(curve.name)}</text>')
    bottom = TITLE + 16 + PLOT_HEIGHT + 38
    body.append(f'<text x="{left + width / 2}" y="{bottom}" text-anchor="middle" class="soft">{escape(x_label)}</text>')
    body.append(f'<text x="16" y="{TITLE + 6}" class="soft">{escape(y_label)}</text>')
    return _document(title, bottom + 16, body)


def _step(most: float) -> float:
    """1, 2 or 5 times a power of ten, so that there are about five of them up to `most`."""
    power = 10.0 ** math.floor(math.log10(most / 4))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= most / 5)


def _document(title: str, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">\n<style>{STYLE}</style>\n'
        f'<text x="16" y="26" class="title">{escape(title)}</text>\n' + "\n".join(body) + "\n</svg>\n"
    )
