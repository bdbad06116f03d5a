"""The tables of one result, in Markdown: timings of every side, speed-ups, remarks, and where it was measured.

A speed-up is the other side's time divided by sdopt's, pair by pair. Below 1, the other side is faster. A speed-up is
quoted only where sdopt's parity is above the case's floors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdopt.bench.record import BenchRecord, Result, SideResult
from sdopt.bench.stats import paired_ratio, summary

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
# component of sdopt -> the component that it is compared with if the other side does not have the same one.
# A step does more than the UNet alone, so this comparison is to sdopt's disadvantage.
COMPARED_WITH = {"step": "unet"}
BUSY = 0.3  # a load average above this fraction of the cores disturbs the timings


def result_tables(record: BenchRecord, result: Result) -> list[str]:
    """The heading of a result, its tables, its remarks and its provenance, as paragraphs."""
    case, sides = result["case"], result["sides"]
    images = "1 image" if case["batch"] == 1 else f"{case['batch']} images"
    heading = (
        f"**{case['model']}, {case['width']}x{case['height']}, {case['steps']} steps, guidance {case['guidance']:g}, "
        f"{images}** (case `{case['name']}`)"
    )
    paragraphs = [heading, _timings(result), _speedups(result)]
    failures = [f"- {s['name']} could not be measured: {_first_line(s['failed'])}" for s in sides if s["failed"]]
    notes = [f"- {s['name']}: {_first_line(s['note'])}" for s in sides if s["note"]]
    remarks = [*failures, *notes, *_not_quoted(result), *_other_pictures(result)]
    if remarks:
        paragraphs.append("\n".join(remarks))
    return [*paragraphs, _provenance(record, result)]


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
    rows.append(["engines on disk, MB", *(_megabytes(count) for count in engine_bytes)])
    peaks = {"peak_rss_bytes": "peak memory of a fresh process, MB", "peak_device_bytes": "peak GPU memory, MB"}
    for key, title in peaks.items():
        if any(memory[key] is not None for memory in memories):
            rows.append([title, *(_megabytes(memory[key]) for memory in memories)])
    rows.append(["parity of the picture, dB", *(_decibel(side["parity"]["picture_db"]) for side in sides)])
    rows.append(["parity of one UNet call, dB", *(_decibel(side["parity"]["unet_db"]) for side in sides)])
    return markdown(rows)


def _speedups(result: Result) -> str:
    """A table of how many times as fast sdopt is, with the 95 % interval. It says if the other side is faster."""
    ours, others = result["sides"][0], _measured(result)[1:]
    compared = ("picture", "unet", "step", "vae_decoder", "text_encoder", "cold_start")
    components = [name for name in compared if name in ours["seconds"]]
    titles = {**TITLES, "step": f"{TITLES['step']}; others: UNet alone"}
    rows = [["sdopt is faster than ... by", *(titles[name] for name in components)]]
    for other in others:
        rows.append([other["name"], *(_speedup(ours, other, name) for name in components)])
    return markdown(rows)


def _speedup(ours: SideResult, other: SideResult, component: str) -> str:
    seconds = other["seconds"]
    theirs = seconds.get(component) or seconds.get(COMPARED_WITH.get(component, ""))
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
    picture, unet = _decibel(ours["parity"]["picture_db"]), _decibel(ours["parity"]["unet_db"])
    parity = f"sdopt's parity is {picture} dB (picture), {unet} dB (UNet)"
    floors = f"the floors are {case['picture_floor_db']:g} and {case['unet_floor_db']:g} dB"
    struck_out: list[str] = []
    for other in _measured(result)[1:]:
        ratio = paired_ratio(other["seconds"]["picture"], ours["seconds"]["picture"])
        struck_out.append(f"~~{ratio.value:.2f}x {other['name']}~~")
    return [f"- not quoted: {', '.join(struck_out)}: {parity}; {floors}"]


def _other_pictures(result: Result) -> list[str]:
    """A remark on the sides that made another picture than PyTorch; none if there is no such side."""
    names = [side["name"] for side in _measured(result)[1:] if not side["quotable"]]
    return [f"- below the floors, or not to be compared (another picture): {', '.join(names)}"] if names else []


def _provenance(record: BenchRecord, result: Result) -> str:
    """Where and how a result was measured, and the command that measured it."""
    peers = [side for side in _measured(result) if side["kind"] == "peer"]
    versions = sorted({f"{peer['name']}: {_versions_text(peer['versions'])}" for peer in peers})
    texts = [machine_text(record), f"{result['threads']} threads, device {result['device']}", *versions]
    return f"<sub>{'; '.join(texts)}.</sub>\n\n    {record['command']}"


def machine_text(record: BenchRecord) -> str:
    """A record's machine, versions, time and commit in one line."""
    machine, gpu = record["machine"], record["gpu"]
    texts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['release']}",
    ]
    if gpu:
        texts.append(f"{gpu['name']}, driver {gpu['driver_version']}")
    texts.append(_versions_text(record["versions"]))
    texts.append(f"{record['created']}, commit {record['commit'] or 'unknown'}")
    was_busy = machine["load_before"] > BUSY * machine["cores"]
    if was_busy:
        texts.append(f"the machine was busy before the run (load {machine['load_before']:g})")
    return "; ".join(texts)


def _measured(result: Result) -> list[SideResult]:
    return [side for side in result["sides"] if side["failed"] is None]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])


def _timing(series: Sequence[float] | None) -> str:
    if series is None:
        return "-"
    times = summary(series)
    return f"{milliseconds(times.median)} ({milliseconds(times.p10)}-{milliseconds(times.p90)})"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with fewer decimals the larger they are."""
    value = 1e3 * seconds
    for least, decimals in ((100, 0), (10, 1), (1, 2)):
        if value >= least:
            return f"{value:.{decimals}f}"
    return f"{value:.3f}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"


def _decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _versions_text(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
