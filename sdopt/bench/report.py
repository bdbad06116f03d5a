"""Tables (Markdown) and plots (SVG) from records. Every number here is computed from their raw timings.

A speed-up is the other side's time divided by sdopt's, pair by pair: below 1 the other side is faster. It is quoted
only where sdopt's parity is above the case's floors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdopt.bench import overview
from sdopt.bench.curves import AXES, costs
from sdopt.bench.record import Record
from sdopt.bench.sides import COMPONENTS
from sdopt.bench.stats import paired_ratio, summary
from sdopt.bench.svg import Bar, bars
from sdopt.bundle.disk import write_whole
from sdopt.errors import UsageError

TITLES = {
    "text_encoder": "text encoder",
    "unet": "UNet, one call",
    "step": "one step in one launch: UNet, guidance, sampler",
    "loop_step": "loop, one step without the UNet",
    "host_step": "loop, the host's time for a step (it waits for nothing)",
    "vae_decoder": "VAE decoder",
    "picture": "picture, end to end",
    "cold_start": "cold start to first picture",
}
PARTS = {
    "text_encoder.device": "text encoder, the GPU's part (CUDA events)",
    "unet.device": "UNet, the GPU's part (CUDA events)",
    "step.device": "one step, the GPU's part (CUDA events)",
    "vae_decoder.device": "VAE decoder, the GPU's part (CUDA events)",
    "cold_start.import": "cold start: import",
    "cold_start.load": "cold start: load",
    "cold_start.picture": "cold start: first picture",
}
BESIDE = {"step": "unet"}  # a whole step beside a call of the UNet alone: what is added counts against sdopt
Result = Mapping[str, Any]


def report(
    records: Sequence[Record], stem: str = "bench", folder: str = "", more: Sequence[Record] = ()
) -> tuple[str, dict[str, str]]:
    """(Markdown, SVG texts by file name); the Markdown shows the plots from `folder`.

    The results of `more` only join the cost curves.
    """
    parts, plots = list[str](), dict[str, str]()
    for i, (record, result) in enumerate((r, result) for r in records for result in r["results"]):
        name = f"{stem}-{i + 1}-{_file(result['case']['name'])}"
        drawn = {f"{name}-latency.svg": _latency(result), f"{name}-speedup.svg": _speedup(result)}
        drawn = {file: text for file, text in drawn.items() if text}
        plots |= drawn
        shown = [f"![{Path(file).stem}]({Path(folder, file).as_posix()})" for file in drawn]
        parts.append("\n\n".join([*_tables(record, result), *shown]))
    results = [result for record in (*records, *more) for result in record["results"]]
    for axis in AXES:
        for i, cost in enumerate(costs(results, axis)):
            file = f"{stem}-{axis}-{i + 1}-{_file(cost.model)}.svg"
            plots[file] = cost.svg()
            shown = f"![{Path(file).stem}]({Path(folder, file).as_posix()})"
            parts += [f"**{cost.title}**", _markdown(cost.rows()), shown]
    parts += [f"<sub>{_machine(record)}.</sub>\n\n    {record['command']}" for record in more]
    return "\n\n".join(parts) + "\n", plots


def _file(name: str) -> str:
    """The name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip(".-")


def short_report(
    records: Sequence[Record], stem: str = "bench", folder: str = "", more: Sequence[Record] = ()
) -> tuple[str, dict[str, str]]:
    """The same for a page with room for one small table and one plot; `more` has no place in it."""
    file, drawn = f"{stem}-overview.svg", overview.svg(records)
    shown = [f"![{Path(file).stem}]({Path(folder, file).as_posix()})"] if drawn else []
    parts = [_markdown(overview.rows(records)), f"<sub>{overview.note(records)}.</sub>", *shown]
    return "\n\n".join(parts) + "\n", {file: drawn} if drawn else {}


SECTIONS = {"bench": report, "bench-overview": short_report}  # what is written between the marks of this name


def write(path: Path, records: Sequence[Record], plots: Path | None = None, more: Sequence[Record] = ()) -> list[Path]:
    """Write the report to `path` and its plots to the folder `plots` (beside it, unless given); the files written.

    A file that has the marks `<!-- bench:start -->` and `<!-- bench:end -->` is kept, and only what is between them
    is replaced. Between `<!-- bench-overview:start -->` and `<!-- bench-overview:end -->` comes the short report.
    Raises: UsageError for a file with one of two marks alone.
    """
    folder = plots or path.parent
    stem = "bench" if plots else path.stem
    place = os.path.relpath(folder, path.parent)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    names = [name for name in SECTIONS if _is_marked(path, text, name)]
    drawn = dict[str, str]()
    for name in names:
        section, own = SECTIONS[name](records, stem, place, more)
        text, drawn = _replaced(text, name, section), drawn | own
    if not names:
        text, drawn = report(records, stem, place, more)
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {path: text, **{folder / file: svg for file, svg in drawn.items()}}
    for target, content in written.items():
        write_whole(target, content)
    return list(written)


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"


def _is_marked(path: Path, text: str, name: str) -> bool:
    """Whether a text has both marks of a section. Raises: UsageError where it has one, or the second one first."""
    start, end = _marks(name)
    if (start in text) != (end in text) or text.find(start) > text.find(end):
        raise UsageError(f"{path}: it has to have both {start} and {end}, in this order, or neither")
    return start in text


def _replaced(text: str, name: str, section: str) -> str:
    """The text with another section between the marks."""
    start, end = _marks(name)
    before, rest = text.split(start, 1)
    return f"{before}{start}\n\n{section}\n{end}{rest.split(end, 1)[1]}"


# ------------------------------------------------------------------------------------------------------ tables


def _tables(record: Record, result: Result) -> list[str]:
    case = result["case"]
    heading = (
        f"**{case['model']}, {case['width']}x{case['height']}, {case['steps']} steps, guidance {case['guidance']:g}, "
        f"{case['batch']} image{'s' * (case['batch'] > 1)}** (case `{case['name']}`)"
    )
    failed = [f"- {s['name']} could not be measured: {_line(s['failed'])}" for s in result["sides"] if s["failed"]]
    notes = [f"- {s['name']}: {_line(s['note'])}" for s in result["sides"] if s["note"]]
    marks = [*failed, *notes, *_not_quoted(result), *_unlike_pictures(result)]
    return [
        heading,
        _timings(result),
        _ratios(result),
        *(["\n".join(marks)] if marks else []),
        _provenance(record, result),
    ]


def _timings(result: Result) -> str:
    """Median milliseconds (10th to 90th percentile) of every side, component by component; memory and parity below."""
    sides = _measured(result)
    rows = [["ms, median (p10-p90)", *(s["name"] for s in sides)]]
    for component, title in TITLES.items():
        if any(component in s["seconds"] for s in sides):
            rows.append([title, *(_timing(s["seconds"].get(component)) for s in sides)])
    for part, title in PARTS.items():
        if any(part in s["parts"] for s in sides):
            rows.append([title, *(_timing(s["parts"].get(part)) for s in sides)])
    rows.append(
        ["engines on disk, MB", *(_megabytes(sum(s["memory"]["engine_bytes"].values()) or None) for s in sides)]
    )
    if any(s["memory"]["peak_rss_bytes"] is not None for s in sides):
        rows.append(["peak memory of a fresh process, MB", *(_megabytes(s["memory"]["peak_rss_bytes"]) for s in sides)])
    if any(s["memory"]["peak_device_bytes"] is not None for s in sides):
        rows.append(["peak GPU memory, MB", *(_megabytes(s["memory"]["peak_device_bytes"]) for s in sides)])
    rows.append(["parity of the picture, dB", *(_decibel(s["parity"]["picture_db"]) for s in sides)])
    rows.append(["parity of one UNet call, dB", *(_decibel(s["parity"]["unet_db"]) for s in sides)])
    return _markdown(rows)


def _ratios(result: Result) -> str:
    """How many times as fast sdopt is, with the 95 % interval; where the other side is faster it says so."""
    ours, others = result["sides"][0], _measured(result)[1:]
    compared = ("picture", "unet", "step", "vae_decoder", "text_encoder", "cold_start")
    components = [c for c in compared if c in ours["seconds"]]
    titles = {**TITLES, "step": f"{TITLES['step']}; others: UNet alone"}
    rows = [["sdopt is faster than ... by", *(titles[c] for c in components)]]
    rows += [[other["name"], *(_ratio(ours, other, c) for c in components)] for other in others]
    return _markdown(rows)


def _ratio(ours: Mapping[str, Any], other: Mapping[str, Any], component: str) -> str:
    theirs = other["seconds"].get(component) or other["seconds"].get(BESIDE.get(component, ""))
    if theirs is None:
        return "-"
    if not ours["quotable"]:
        return "not quoted"
    e = paired_ratio(theirs, ours["seconds"][component])
    verdict = f" ({other['name']} is faster)" if e.high < 1 else ""
    return f"{e}{verdict}"


def _not_quoted(result: Result) -> list[str]:
    """What the table leaves out, struck: the parity is below the floor, so the speed is not of the same picture."""
    ours, case = result["sides"][0], result["case"]
    if ours["quotable"]:
        return []
    floors = f"the floors are {case['picture_floor_db']:g} and {case['unet_floor_db']:g} dB"
    at = f"{_decibel(ours['parity']['picture_db'])} dB (picture), {_decibel(ours['parity']['unet_db'])} dB (UNet)"
    struck = [
        f"~~{paired_ratio(o['seconds']['picture'], ours['seconds']['picture']).value:.2f}x {o['name']}~~"
        for o in _measured(result)[1:]
    ]
    return [f"- not quoted: {', '.join(struck)}: sdopt's parity is {at}; {floors}"]


def _unlike_pictures(result: Result) -> list[str]:
    names = [s["name"] for s in _measured(result)[1:] if not s["quotable"]]
    return [f"- below the floors, or not to be compared (another picture): {', '.join(names)}"] if names else []


def _provenance(record: Record, result: Result) -> str:
    own = {f"{s['name']}: {_pairs(s['versions'])}" for s in _measured(result) if s["kind"] == "peer"}
    texts = [_machine(record), f"{result['threads']} threads, device {result['device']}", *sorted(own)]
    return f"<sub>{'; '.join(texts)}.</sub>\n\n    {record['command']}"


def _machine(record: Record) -> str:
    machine, gpu = record["machine"], record["gpu"]
    texts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['release']}",
        *([f"{gpu['name']}, driver {gpu['driver_version']}"] if gpu else []),
        _pairs(record["versions"]),
        f"{record['created']}, commit {record['commit'] or 'unknown'}",
    ]
    if machine["load_before"] > 0.3 * machine["cores"]:
        texts.append(f"the machine was busy before the run (load {machine['load_before']:g})")
    return "; ".join(texts)


def _measured(result: Result) -> list[Mapping[str, Any]]:
    return [side for side in result["sides"] if side["failed"] is None]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])


def _timing(series: Sequence[float] | None) -> str:
    if series is None:
        return "-"
    s = summary(series)
    return f"{_ms(s.median)} ({_ms(s.p10)}-{_ms(s.p90)})"


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"


def _decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _pairs(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _line(text: str) -> str:
    return text.splitlines()[0][:300]


# ------------------------------------------------------------------------------------------------------- plots


def _latency(result: Result) -> str:
    groups: list[tuple[str, list[Bar]]] = []
    for component in (*COMPONENTS, "cold_start"):
        group: list[Bar] = []
        for colour, side in enumerate(result["sides"]):
            if component in side["seconds"]:
                s = summary(side["seconds"][component])
                mark = "" if side["quotable"] else " *"
                group.append(Bar(side["name"] + mark, f"{_ms(s.median)} ms", s.median, s.p10, s.p90, colour))
        if group:
            groups.append((TITLES[component], group))
    return bars(f"{_title(result)}: latency, median and p10-p90 (* below the parity floor)", groups)


def _speedup(result: Result) -> str:
    """Bars of the quoted speed-ups; empty where there are none."""
    ours = result["sides"][0]
    groups: list[tuple[str, list[Bar]]] = []
    for component in ("picture", "unet", "cold_start"):
        group: list[Bar] = []
        for colour, other in enumerate(result["sides"]):
            if other is not ours and component in other["seconds"] and component in ours["seconds"]:
                e = paired_ratio(other["seconds"][component], ours["seconds"][component])
                group.append(Bar(other["name"], f"{e.value:.2f}x", e.value, e.low, e.high, colour))
        if group:
            groups.append((f"{TITLES[component]}: other time / sdopt's", group))
    title = f"{_title(result)}: speed-up of sdopt, 95 % interval (line: equal)"
    return bars(title, groups, mark=1.0) if groups and ours["quotable"] else ""


def _title(result: Result) -> str:
    case = result["case"]
    return f"{case['model']} {case['width']}x{case['height']}, {case['steps']} steps"
