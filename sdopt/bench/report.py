"""Pages of tables (Markdown) and plots (SVG) from records. Every number is computed from the records' raw timings."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from sdopt.bench import overview
from sdopt.bench.curves import AXES, costs
from sdopt.bench.record import BenchRecord, Result
from sdopt.bench.sides import COMPONENTS
from sdopt.bench.stats import paired_ratio, summary
from sdopt.bench.svg import Bar, bars
from sdopt.bench.tables import TITLES, machine_text, markdown, milliseconds, result_tables
from sdopt.bundle.disk import read_given, write_named
from sdopt.errors import UsageError


def report(
    records: Sequence[BenchRecord], stem: str = "bench", folder: str = "", more: Sequence[BenchRecord] = ()
) -> tuple[str, dict[str, str]]:
    """(Markdown, the plots as SVG texts by file name). The Markdown shows the plots from `folder`.

    The results of `more` appear in the cost curves only.
    """
    parts, plots = list[str](), dict[str, str]()
    pairs = [(record, result) for record in records for result in record["results"]]
    for number, (record, result) in enumerate(pairs, 1):
        name = f"{stem}-{number}-{_file_name(result['case']['name'])}"
        candidates = {f"{name}-latency.svg": _latency(result), f"{name}-speedup.svg": _speedup(result)}
        result_plots = {file: text for file, text in candidates.items() if text}
        plots |= result_plots
        parts += [*result_tables(record, result), *(_image(folder, file) for file in result_plots)]
    results = [result for record in (*records, *more) for result in record["results"]]
    for axis in AXES:
        for number, cost in enumerate(costs(results, axis), 1):
            file = f"{stem}-{axis}-{number}-{_file_name(cost.model)}.svg"
            plots[file] = cost.svg()
            parts += [f"**{cost.title}**", markdown(cost.rows()), _image(folder, file)]
    parts += [f"<sub>{machine_text(record)}.</sub>\n\n    {record['command']}" for record in more]
    return "\n\n".join(parts) + "\n", plots


def _image(folder: str, file: str) -> str:
    """The Markdown that shows a plot."""
    return f"![{Path(file).stem}]({Path(folder, file).as_posix()})"


def _file_name(name: str) -> str:
    """The name, with a hyphen in place of all characters that do not suit the name of a file."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip(".-")


def short_report(
    records: Sequence[BenchRecord], stem: str = "bench", folder: str = "", more: Sequence[BenchRecord] = ()
) -> tuple[str, dict[str, str]]:
    """The same as one small table and at most one plot. `more` is not used."""
    parts = [markdown(overview.rows(records)), f"<sub>{overview.note(records)}.</sub>"]
    plots: dict[str, str] = {}
    svg = overview.svg(records)
    if svg:
        file = f"{stem}-overview.svg"
        plots[file] = svg
        parts.append(_image(folder, file))
    return "\n\n".join(parts) + "\n", plots


MAX_BYTES = 64 << 20  # of a page with marks
SECTIONS = {"bench": report, "bench-overview": short_report}  # name of the marks -> what is written between them


def write(
    path: Path, records: Sequence[BenchRecord], plots: Path | None = None, more: Sequence[BenchRecord] = ()
) -> list[Path]:
    """Write the report to `path` and its plots to the folder `plots` (default: beside it). Returns the files written.

    If the file has the marks `<!-- bench:start -->` and `<!-- bench:end -->`, only the text between them is replaced.
    The short report is written between `<!-- bench-overview:start -->` and `<!-- bench-overview:end -->`.
    Raises: UsageError for a file with only one of two marks.
    """
    folder = plots or path.parent
    stem = "bench" if plots else path.stem
    relative_folder = os.path.relpath(folder, path.parent)
    text, marked = marked_text(path)
    svgs: dict[str, str] = {}
    for name in marked:
        section, section_svgs = SECTIONS[name](records, stem, relative_folder, more)
        text = _replace_section(text, name, section)
        svgs |= section_svgs
    if not marked:
        text, svgs = report(records, stem, relative_folder, more)
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {path: text, **{folder / file: svg for file, svg in svgs.items()}}
    for target, content in files.items():
        write_named(target, content)
    return list(files)


def marked_text(path: Path) -> tuple[str, list[str]]:
    """(the text of a file, or "" if there is none; the sections that it has marks of).

    Raises: UsageError if it is no text, or has only one of two marks.
    """
    try:
        text = read_given(path, MAX_BYTES).decode() if path.exists() else ""
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: its text cannot be read: {error}; name another file") from error
    return text, [name for name in SECTIONS if _is_marked(path, text, name)]


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"


def _is_marked(path: Path, text: str, name: str) -> bool:
    """Whether a text has both marks of a section.

    Raises: UsageError if it has only one of them, or the second one first.
    """
    start, end = _marks(name)
    if start not in text and end not in text:
        return False
    in_order = start in text and end in text and text.index(start) < text.index(end)
    if not in_order:
        raise UsageError(f"{path}: it has to have both {start} and {end}, in this order, or neither")
    return True


def _replace_section(text: str, name: str, section: str) -> str:
    """The text with `section` between the marks."""
    start, end = _marks(name)
    before, rest = text.split(start, 1)
    _, after = rest.split(end, 1)
    return f"{before}{start}\n\n{section}\n{end}{after}"


def _latency(result: Result) -> str:
    """The plot of latencies: a group of bars for each component that any side has."""
    groups: list[tuple[str, list[Bar]]] = []
    for component in (*COMPONENTS, "cold_start"):
        group: list[Bar] = []
        for colour, side in enumerate(result["sides"]):
            if component in side["seconds"]:
                times = summary(side["seconds"][component])
                name = side["name"] if side["quotable"] else f"{side['name']} *"
                words = f"{milliseconds(times.median)} ms"
                group.append(Bar(name, words, times.median, times.p10, times.p90, colour))
        if group:
            groups.append((TITLES[component], group))
    return bars(f"{_title(result)}: latency, median and p10-p90 (* below the parity floor)", groups)


def _speedup(result: Result) -> str:
    """The plot of speed-ups; empty if none may be quoted."""
    ours = result["sides"][0]
    if not ours["quotable"]:
        return ""
    groups: list[tuple[str, list[Bar]]] = []
    for component in ("picture", "unet", "cold_start"):
        group: list[Bar] = []
        for colour, other in enumerate(result["sides"]):
            both_measured = component in other["seconds"] and component in ours["seconds"]
            if other is not ours and both_measured:
                ratio = paired_ratio(other["seconds"][component], ours["seconds"][component])
                group.append(Bar(other["name"], f"{ratio.value:.2f}x", ratio.value, ratio.low, ratio.high, colour))
        if group:
            groups.append((f"{TITLES[component]}: other time / sdopt's", group))
    title = f"{_title(result)}: speed-up of sdopt, 95 % interval (line: equal)"
    return bars(title, groups, mark=1.0) if groups else ""


def _title(result: Result) -> str:
    case = result["case"]
    return f"{case['model']} {case['width']}x{case['height']}, {case['steps']} steps"
