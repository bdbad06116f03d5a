"""Small plots as SVG: bars with whiskers, lines, and points. Their colours follow the reader's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from sdopt.dataclass import dataclass

WIDTH, LEFT, RIGHT, ROW, GAP, TITLE = 760, 190, 120, 24, 34, 44
PLOT_HEIGHT, COLOURS = 300, 6
PLOT_LEFT = 80
PLOT_WIDTH = WIDTH - PLOT_LEFT - RIGHT
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
    """One bar: its name, the words after it, its length, the ends of its whisker, its colour (a number)."""

    name: str
    words: str
    value: float
    low: float
    high: float
    colour: int


def bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], mark: float | None = None) -> str:
    """Groups of horizontal bars, each group on its own scale. A dashed line is drawn through every group at `mark`."""
    y, body = TITLE, list[str]()
    for heading, group in groups:
        longest = max([bar.high for bar in group] + ([mark] if mark else []))
        body.append(f'<text x="16" y="{y + 14}" class="soft">{escape(heading)}</text>')
        y += 22
        top = y
        for bar in group:
            body += _bar(bar, y, longest)
            y += ROW
        if mark:
            x = _bar_end(mark, longest)
            body.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 2}" y2="{y}" class="axis" stroke-dasharray="3 3"/>'
            )
        y += GAP - ROW // 2
    return _document(title, y, body)


def _bar_end(value: float, longest: float) -> float:
    """The x where a bar of this value ends, if `longest` ends at the right edge."""
    return LEFT + value / longest * (WIDTH - LEFT - RIGHT)


def _bar(bar: Bar, y: int, longest: float) -> list[str]:
    end, low, high = (_bar_end(value, longest) for value in (bar.value, bar.low, bar.high))
    middle = y + ROW / 2 - 2
    return [
        f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect x="{LEFT}" y="{y + 2}" width="{end - LEFT:.1f}" height="{ROW - 8}" rx="2" '
        f'class="bar c{bar.colour % COLOURS}"/>',
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" class="whisker"/>',
        f'<text x="{max(end, high) + 8:.1f}" y="{y + 15}">{escape(bar.words)}</text>',
    ]


@dataclass(frozen=True)
class Curve:
    """A named line through points (x, y), with its colour (a number)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int


@dataclass(frozen=True)
class _Heights:
    """The vertical axis: the values that are marked on it, in ascending order, and its scale."""

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


@dataclass(frozen=True)
class _Axes:
    """A plot's axes: x from zero to `x_max`, y as `heights` has it."""

    heights: _Heights
    x_max: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is on the page."""
        return PLOT_LEFT + x / self.x_max * PLOT_WIDTH, TITLE + 16 + (1 - self.heights.fraction(y)) * PLOT_HEIGHT

    def drawn(self, numbers: Sequence[float]) -> list[str]:
        """A line for each mark of y, and these numbers along x."""
        body: list[str] = []
        for i, mark in enumerate(self.heights.marks):
            (x, y), (end, _), kind = self.at(0, mark), self.at(self.x_max, mark), "grid" if i else "axis"
            body.append(f'<line x1="{x:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="{kind}"/>')
            body.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end" class="soft">{mark:g}</text>')
        for number in numbers:
            x, y = self.at(number, self.heights.marks[0])
            body.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" class="soft">{number:g}</text>')
        return body


def lines(title: str, x_label: str, y_label: str, curves: Sequence[Curve], *, decades: bool = False) -> str:
    """Curves with a dot at each point. x begins at zero. y begins at zero too, or is marked in powers of ten.

    The names of the curves are at the left or, if all curves fall, at the right.
    """
    points = [point for curve in curves for point in curve.points]
    values = [y for _, y in points]
    heights = _decades(values) if decades else _from_zero(values)
    x_max = max(x for x, _ in points) or 1
    all_fall = all(curve.points[0][1] > curve.points[-1][1] for curve in curves)
    names_at = PLOT_LEFT + 16 + (PLOT_WIDTH - RIGHT if all_fall else 0)
    axes, numbers = _Axes(heights, x_max), sorted({x for x, _ in points})
    body, at = axes.drawn(numbers[:: math.ceil(len(numbers) / NUMBERS)]), axes.at
    for i, curve in enumerate(curves):
        colour = curve.colour % COLOURS
        placed = [at(x, y) for x, y in sorted(curve.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        body.append(f'<polyline points="{path}" class="line c{colour}"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot c{colour}"/>' for x, y in placed]
        y = TITLE + 24 + 20 * i
        body.append(f'<rect x="{names_at}" y="{y - 9}" width="10" height="10" class="key c{colour}"/>')
        body.append(f'<text x="{names_at + 16}" y="{y}">{escape(curve.name)}</text>')
    return _plotted(title, x_label, y_label, body)


@dataclass(frozen=True)
class Mark:
    """A named point, with its colour (a number)."""

    name: str
    at: tuple[float, float]
    colour: int


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    cloud: Sequence[tuple[float, float]],
    curve: Sequence[tuple[float, float]],
    marks: Sequence[Mark],
) -> str:
    """Points, a line through some of them, and named points. x begins at zero, y at a round number below all."""
    everything = [*cloud, *curve, *(mark.at for mark in marks)]
    values = [y for _, y in everything]
    step = _step(max(1.0, max(values) - min(values)))
    low = math.floor(min(values) / step)
    heights = _Heights([i * step for i in range(low, max(math.ceil(max(values) / step), low + 1) + 1)], float)
    x_step = _step(max(x for x, _ in everything))
    x_max = x_step * math.ceil(max(x for x, _ in everything) / x_step)
    axes = _Axes(heights, x_max)
    body, at = axes.drawn([i * x_step for i in range(round(x_max / x_step) + 1)]), axes.at
    for x, y in dict.fromkeys(at(*one) for one in cloud):
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" class="dot c5" opacity="0.5"/>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*one) for one in sorted(curve)))
    body.append(f'<polyline points="{path}" class="line c0"/>')
    for one in marks:
        x, y = at(*one.at)
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="dot c{one.colour % COLOURS}"/>')
        body.append(f'<text x="{x + 9:.1f}" y="{y + 14:.1f}">{escape(one.name)}</text>')
    return _plotted(title, x_label, y_label, body)


def _plotted(title: str, x_label: str, y_label: str, body: list[str]) -> str:
    """The document of a plot, with the names of its axes."""
    bottom, middle = TITLE + 16 + PLOT_HEIGHT + 38, PLOT_LEFT + PLOT_WIDTH / 2
    names = [
        f'<text x="{middle}" y="{bottom}" text-anchor="middle" class="soft">{escape(x_label)}</text>',
        f'<text x="16" y="{TITLE + 6}" class="soft">{escape(y_label)}</text>',
    ]
    return _document(title, bottom + 16, [*body, *names])


def _step(largest: float) -> float:
    """1, 2, 5 or 10 times a power of ten: the smallest of which five reach `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= largest / 5)


def _document(title: str, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">\n<style>{STYLE}</style>\n'
        f'<text x="16" y="26" class="title">{escape(title)}</text>\n' + "\n".join(body) + "\n</svg>\n"
    )
