"""One small table and one plot of all cases, for the page that a newcomer reads first.

A row is about a picture from end to end, or about a cold start that was measured often enough. It has two speed-ups:
over diffusers in fp32, and over the fastest other side that makes the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdopt.bench.baseline import REFERENCE
from sdopt.bench.record import BenchRecord, Result, SideResult
from sdopt.bench.sides import OURS
from sdopt.bench.stats import paired_ratio, summary
from sdopt.bench.svg import Bar, bars

COLD_ROUNDS = 3  # with fewer cold starts, a case has no row for them
HEAD = [
    "one picture, end to end",
    OURS,
    f"diffusers ({REFERENCE})",
    "faster than diffusers by",
    "faster than the fastest other by",
    "parity, dB",
]
TITLE = "one picture, end to end: median and p10-p90 (* is another picture)"


def rows(records: Sequence[BenchRecord]) -> list[list[str]]:
    """The table, with its head."""
    table = [HEAD]
    for result in _results(records):
        table.append(_row(_label(result["case"]), "picture", result))
        if len(result["sides"][0]["seconds"].get("cold_start", ())) >= COLD_ROUNDS:
            table.append(_row(f"{result['case']['model']}, cold start to first picture", "cold_start", result))
    return table


def svg(records: Sequence[BenchRecord]) -> str:
    """The plot: a group of bars for each case whose speed may be quoted; empty without such a case."""
    quoted = [result for result in _results(records) if result["sides"][0]["quotable"]]
    names = dict.fromkeys(side["name"] for result in quoted for side in _measured(result, "picture"))
    colours = {name: colour for colour, name in enumerate(names)}
    groups: list[tuple[str, list[Bar]]] = []
    for result in quoted:
        group = [_bar(side, colours[side["name"]]) for side in _measured(result, "picture")]
        groups.append((_label(result["case"]), group))
    return bars(TITLE, groups) if groups else ""


def note(records: Sequence[BenchRecord]) -> str:
    """The machines and the days of the records, in one line."""
    machines = [record["machine"] for record in records]
    places = [f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 1e9:.0f} GB" for m in machines]
    places += [record["gpu"]["name"] for record in records if record["gpu"]]
    days = sorted({record["created"][:10] for record in records})
    return "; ".join([*dict.fromkeys(places), *days])


def _results(records: Sequence[BenchRecord]) -> list[Result]:
    return [result for record in records for result in record["results"]]


def _label(case: Mapping[str, Any]) -> str:
    """A case in words, without values that are defaults."""
    steps = "1 step" if case["steps"] == 1 else f"{case['steps']} steps"
    words = [f"{case['model']} {case['width']}x{case['height']}", steps]
    if case["batch"] > 1:
        words.append(f"{case['batch']} images")
    if case["precision"] not in ("auto", "float32", "fp32"):
        words.append(case["precision"])
    if case["memory"] != "fast":
        words.append(f"{case['memory']} memory")
    return ", ".join(words)


def _measured(result: Result, component: str) -> list[SideResult]:
    """The sides of a result that have timings of this component."""
    return [side for side in result["sides"] if side["failed"] is None and component in side["seconds"]]


def _row(label: str, component: str, result: Result) -> list[str]:
    measured = _measured(result, component)
    if not measured or measured[0]["name"] != OURS:
        return [label, *["-"] * (len(HEAD) - 1)]
    ours, others = measured[0], measured[1:]
    reference = next((side for side in others if side["name"] == REFERENCE), None)
    rivals = [side for side in others if side["name"] != REFERENCE and side["quotable"]]
    fastest = min(rivals, key=lambda side: _median(side, component), default=None)
    parity = ours["parity"]["picture_db"]
    return [
        label,
        _time_text(_median(ours, component)),
        "-" if reference is None else _time_text(_median(reference, component)),
        "-" if reference is None else _ratio(ours, reference, component),
        "-" if fastest is None else f"{fastest['name']} {_ratio(ours, fastest, component)}",
        "-" if parity is None else f"{parity:.1f}",
    ]


def _ratio(ours: SideResult, other: SideResult, component: str) -> str:
    if not ours["quotable"]:
        return "not quoted"
    return str(paired_ratio(other["seconds"][component], ours["seconds"][component]))


def _median(side: SideResult, component: str) -> float:
    return summary(side["seconds"][component]).median


def _time_text(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"


def _bar(side: SideResult, colour: int) -> Bar:
    times = summary(side["seconds"]["picture"])
    mark = "" if side["quotable"] else " *"
    return Bar(side["name"] + mark, _time_text(times.median), times.median, times.p10, times.p90, colour)
