"""Tables (Markdown) and plots (SVG) from records. Every number is computed from the raw timings of the records.

A speed-up is the other side's time divided by sdopt's, pair by pair. Below 1, the other side is faster. A speed-up is
quoted only where sdopt's parity is above the case's floors.
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
# component of sdopt -> what it is compared with where the other side does not have it. A step does more than the UNet
# alone, so this comparison is to sdopt's disadvantage.
BESIDE = {"step": "unet"}
Result = Mapping[str, Any]


def report(
    records: Sequence[Record], stem: str = "bench", folder: str = "", more: Sequence[Record] = ()
) -> tuple[str, dict[str, str]]:
    """(Markdown, SVG texts by file name); the Markdown shows the plots from `folder`.

    The results of `more` only join the cost curves.
    """
    parts, plots = list[str](), dict[str, str]()
    pairs = [(record, result) for record in records for result in record["results"]]
    for number, (record, result) in enumerate(pairs, 1):
        name = f"{stem}-{number}-{_file(result['case']['name'])}"
        drawn = {f"{name}-latency.svg": _latency(result), f"{name}-speedup.svg": _speedup(result)}
        drawn = {file: text for file, text in drawn.items() if text}
        plots |= drawn
        parts.append("\n\n".join([*_tables(record, result), *(_shown(folder, file) for file in drawn)]))
    results = [result for record in (*records, *more) for result in record["results"]]
    for axis in AXES:
        for number, cost in enumerate(costs(results, axis), 1):
            file = f"{stem}-{axis}-{number}-{_file(cost.model)}.svg"
            plots[file] = cost.svg()
            parts += [f"**{cost.title}**", _markdown(cost.rows()), _shown(folder, file)]
    parts += [f"<sub>{_machine(record)}.</sub>\n\n    {record['command']}" for record in more]
    return "\n\n".join(parts) + "\n", plots


def _shown(folder: str, file: str) -> str:
    """The Markdown that shows a plot."""
    return f"![{Path(file).stem}]({Path(folder, file).as_posix()})"


def _file(name: str) -> str:
    """The name with only those characters that suit the name of a file."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip(".-")


def short_report(
    records: Sequence[Record], stem: str = "bench", folder: str = "", more: Sequence[Record] = ()
) -> tuple[str, dict[str, str]]:
    """The same as one small table and at most one plot. `more` is not used."""
    parts = [_markdown(overview.rows(records)), f"<sub>{overview.note(records)}.</sub>"]
    plots: dict[str, str] = {}
    drawn = overview.svg(records)
    if drawn:
        file = f"{stem}-overview.svg"
        plots[file] = drawn
        parts.append(_shown(folder, file))
    return "\n\n".join(parts) + "\n", plots


SECTIONS = {"bench": report, "bench-overview": short_report}  # what is written between the marks of this name


def write(path: Path, records: Sequence[Record], plots: Path | None = None, more: Sequence[Record] = ()) -> list[Path]:
    """Write the report to `path` and its plots to the folder `plots` (default: beside it). Return the files written.

    If the file has the marks `<!-- bench:start -->` and `<!-- bench:end -->`, only the text between them is replaced.
    The short report is written between `<!-- bench-overview:start -->` and `<!-- bench-overview:end -->`.
    Raises: UsageError for a file with only one of two marks.
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
    """Whether a text has both marks of a section.

    Raises: UsageError if it has only one of them, or the second one first.
    """
    start, end = _marks(name)
    if start not in text and end not in text:
        return False
    start_at, end_at = text.find(start), text.find(end)
    if min(start_at, end_at) < 0 or start_at > end_at:
        raise UsageError(f"{path}: it has to have both {start} and {end}, in this order, or neither")
    return True


def _replaced(text: str, name: str, section: str) -> str:
    """The text with another section between the marks."""
    start, end = _marks(name)
    before, rest = text.split(start, 1)
    return f"{before}{start}\n\n{section}\n{end}{rest.split(end, 1)[1]}"


# ------------------------------------------------------------------------------------------------------ tables


def _tables(record: Record, result: Result) -> list[str]:
    case, sides = result["case"], result["sides"]
    images = "1 image" if case["batch"] == 1 else f"{case['batch']} images"
    heading = (
        f"**{case['model']}, {case['width']}x{case['height']}, {case['steps']} steps, guidance {case['guidance']:g}, "
        f"{images}** (case `{case['name']}`)"
    )
    tables = [heading, _timings(result), _ratios(result)]
    failed = [f"- {side['name']} could not be measured: {_line(side['failed'])}" for side in sides if side["failed"]]
    notes = [f"- {side['name']}: {_line(side['note'])}" for side in sides if side["note"]]
    remarks = [*failed, *notes, *_not_quoted(result), *_unlike_pictures(result)]
    if remarks:
        tables.append("\n".join(remarks))
    return [*tables, _provenance(record, result)]


def _timings(result: Result) -> str:
    """A table of every side: milliseconds of each component, then memory, then parity."""
    sides = _measured(result)
    memories = [side["memory"] for side in sides]
    rows = [["ms, median (p10-p90)", *(side["name"] for side in sides)]]
    for key, titles in (("seconds", TITLES), ("parts", PARTS)):
        for name, title in titles.items():
            if any(name in side[key] for side in sides):
                rows.append([title, *(_timing(side[key].get(name)) for side in sides)])
    engine_bytes = [sum(memory["engine_bytes"].values()) or None for memory in memories]
    rows.append(["engines on disk, MB", *map(_megabytes, engine_bytes)])
    peaks = {"peak_rss_bytes": "peak memory of a fresh process, MB", "peak_device_bytes": "peak GPU memory, MB"}
    for key, title in peaks.items():
        if any(memory[key] is not None for memory in memories):
            rows.append([title, *(_megabytes(memory[key]) for memory in memories)])
    rows.append(["parity of the picture, dB", *(_decibel(side["parity"]["picture_db"]) for side in sides)])
    rows.append(["parity of one UNet call, dB", *(_decibel(side["parity"]["unet_db"]) for side in sides)])
    return _markdown(rows)


def _ratios(result: Result) -> str:
    """A table of how many times as fast sdopt is, with the 95 % interval. It says where the other side is faster."""
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
    ratio = paired_ratio(theirs, ours["seconds"][component])
    return f"{ratio} ({other['name']} is faster)" if ratio.high < 1 else str(ratio)


def _not_quoted(result: Result) -> list[str]:
    """The speed-ups that the table leaves out, struck through, because sdopt made another picture."""
    ours, case = result["sides"][0], result["case"]
    if ours["quotable"]:
        return []
    floors = f"the floors are {case['picture_floor_db']:g} and {case['unet_floor_db']:g} dB"
    at = f"{_decibel(ours['parity']['picture_db'])} dB (picture), {_decibel(ours['parity']['unet_db'])} dB (UNet)"
    struck: list[str] = []
    for other in _measured(result)[1:]:
        ratio = paired_ratio(other["seconds"]["picture"], ours["seconds"]["picture"])
        struck.append(f"~~{ratio.value:.2f}x {other['name']}~~")
    return [f"- not quoted: {', '.join(struck)}: sdopt's parity is {at}; {floors}"]


def _unlike_pictures(result: Result) -> list[str]:
    names = [s["name"] for s in _measured(result)[1:] if not s["quotable"]]
    return [f"- below the floors, or not to be compared (another picture): {', '.join(names)}"] if names else []


def _provenance(record: Record, result: Result) -> str:
    peers = [side for side in _measured(result) if side["kind"] == "peer"]
    versions = sorted({f"{peer['name']}: {_pairs(peer['versions'])}" for peer in peers})
    texts = [_machine(record), f"{result['threads']} threads, device {result['device']}", *versions]
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
    times = summary(series)
    return f"{_ms(times.median)} ({_ms(times.p10)}-{_ms(times.p90)})"


def _ms(seconds: float) -> str:
    """Milliseconds; the larger they are, the fewer decimals."""
    ms = 1e3 * seconds
    for least, decimals in ((100, 0), (10, 1), (1, 2)):
        if ms >= least:
            return f"{ms:.{decimals}f}"
    return f"{ms:.3f}"


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
                times = summary(side["seconds"][component])
                name = side["name"] if side["quotable"] else f"{side['name']} *"
                group.append(Bar(name, f"{_ms(times.median)} ms", times.median, times.p10, times.p90, colour))
        if group:
            groups.append((TITLES[component], group))
    return bars(f"{_title(result)}: latency, median and p10-p90 (* below the parity floor)", groups)


def _speedup(result: Result) -> str:
    """Bars of the speed-ups; empty if none may be quoted."""
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
