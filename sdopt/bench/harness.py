"""Measure one case on every side: open the sides, compare their outputs, time them in turns, start them cold."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np

from sdopt.bench import machine, record
from sdopt.bench.baseline import REFERENCE, Baseline, DiffusersSide
from sdopt.bench.built import BuiltSide, open_side
from sdopt.bench.cases import Case
from sdopt.bench.peers import PeerSide, cold_start, command_of
from sdopt.bench.sides import COMPONENTS, OURS, Inputs, Side, latents_of
from sdopt.bench.timing import Call, Sample, Series, interleaved
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32
from sdopt.bundle.unfinished import scratch
from sdopt.dataclass import dataclass
from sdopt.errors import BackendError, NumericsError, UsageError
from sdopt.metrics import psnr

Report = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """Which sides are measured, and how often. `peers`: the command of each peer, by its name."""

    bundle: Path
    checkpoint: Path
    threads: int
    baselines: Sequence[str] = (REFERENCE,)
    peers: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    rounds: int = 5
    warmup: int = 1
    cold_rounds: int = 3
    device: str = "cpu"
    cache: Path = Path("build-out/peers")

    def __post_init__(self) -> None:
        object.__setattr__(self, "baselines", [Baseline.parse(name).name for name in self.baselines])
        names = [OURS, *self.baselines, *self.peers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UsageError(f"{', '.join(repeated)}: a side is named twice; they are {', '.join(names)}")
        if min(self.rounds, self.warmup, self.threads) < 1 or self.cold_rounds < 0:
            raise UsageError("allowed are 1 or more rounds, warm-up calls and threads, and 0 or more cold rounds")


def new_record(command: str, results: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A record with the machine and the versions as they are now."""
    return {
        "schema": record.SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": machine.commit(),
        "machine": machine.machine(),
        "gpu": machine.gpu(),
        "versions": machine.versions(),
        "results": list(results),
    }


def run_case(case: Case, setup: Setup, report: Report = print) -> dict[str, Any]:
    """Measure a case. Returns its result, as a record holds it.

    Raises: what sdopt or the reference raises. If another side fails, its entry says why.
    """
    report(f"{case.name}: {case.width}x{case.height}, {case.steps} steps, guidance {case.guidance}")
    bundle = Bundle.open(setup.bundle)
    with scratch() as folder:
        latents, path = latents_of(case, bundle), folder / "latents.npy"
        np.save(path, latents)
        request = _request(case, setup, path)
        entries = _warm_entries(case, setup, latents, request, report)
        add_cold_starts([entry for entry in entries if starts_cold(entry)], setup, request, report)
    return {
        "case": case.to_json(),
        "bundle": {"digest": bundle.digest, "family": bundle.manifest.family},
        "threads": setup.threads,
        "device": setup.device,
        "sides": entries,
    }


def _warm_entries(
    case: Case, setup: Setup, latents: Float32, request: Mapping[str, Any], report: Report
) -> list[dict[str, Any]]:
    """Open all sides, compare and time them. Returns their entries, still without cold starts."""
    with ExitStack() as stack:
        ours = open_side(case, setup.bundle, setup.threads)
        stack.callback(ours.close)
        reference = DiffusersSide(REFERENCE, case, setup.checkpoint, setup.threads, setup.device)
        stack.callback(reference.close)
        sides: dict[str, Side | str] = {OURS: ours, REFERENCE: reference}  # a side, or why it cannot be opened
        for name in [*setup.baselines, *setup.peers]:
            if name in sides:
                continue
            side = _open(name, case, setup, request, report)
            sides[name] = side
            if not isinstance(side, str):
                stack.callback(side.close)
        inputs = reference.inputs(latents)
        if isinstance(ours, BuiltSide):
            inputs = ours.first_inputs(inputs)
        with reference.exact():
            expected = _outputs(reference.calls(inputs))
        prediction = expected["unet"]
        if isinstance(ours, BuiltSide) and prediction is not None:
            expected["step"] = ours.guided(prediction, inputs)
        compared = {name: _compare(name, side, inputs, expected, case, report) for name, side in sides.items()}
        _require_ours_and_reference(compared)
        timings = _time_in_turns(compared, setup, report)
        return [_entry(side, case, timings[name]) for name, side in compared.items()]


@dataclass(frozen=True)
class _Compared:
    """A side after its first calls: their parity with the reference, or why they failed.

    `side` is None if it could not be opened.
    """

    name: str
    side: Side | None
    calls: Mapping[str, Call]
    parity: Mapping[str, float | None]
    failed: str | None


def _request(case: Case, setup: Setup, latents: Path) -> dict[str, Any]:
    return {
        "case": case.to_json(),
        "checkpoint": str(setup.checkpoint.absolute()),
        "bundle": str(setup.bundle.absolute()),
        "cache": str(setup.cache.absolute()),
        "latents": str(latents),
        "threads": setup.threads,
        "device": setup.device,
    }


def _open(name: str, case: Case, setup: Setup, request: Mapping[str, Any], report: Report) -> Side | str:
    """The side, or why it cannot be opened."""
    report(f"  opening {name}")
    try:
        if name in setup.peers:
            return PeerSide(name, setup.peers[name], request)
        return DiffusersSide(name, case, setup.checkpoint, setup.threads, setup.device)
    except Exception as error:  # libraries raise all kinds of errors; the other sides are still measured
        report(f"  {name} cannot be measured: {error}")
        return f"{type(error).__name__}: {error}"


def _compare(
    name: str, side: Side | str, inputs: Inputs, expected: Mapping[str, Array | None], case: Case, report: Report
) -> _Compared:
    """Call every component once. The call warms it up, and its output is compared with the reference's."""
    unknown: dict[str, float | None] = {"picture_db": None, "unet_db": None}
    if isinstance(side, str):
        return _Compared(name, None, {}, unknown, side)
    try:
        calls = side.calls(inputs)
        outputs = _outputs(calls)
        parity = {
            "picture_db": parity_db(expected, outputs, "picture", peak=1.0, half_level=side.half_level),
            "unet_db": parity_db(expected, outputs, "step" if "step" in outputs else "unet"),
        }
    except Exception as error:  # libraries raise all kinds of errors; the other sides are still measured
        report(f"  {name} cannot be measured: {error}")
        return _Compared(name, side, {}, unknown, f"{type(error).__name__}: {error}")
    if not record.quotable(parity, case):
        report(f"  {name}: {parity} is below the case's floor or cannot be compared; its speed is marked")
    return _Compared(name, side, calls, parity, None)


def _outputs(calls: Mapping[str, Call]) -> dict[str, Array | None]:
    return {name: call().output for name, call in calls.items()}


def _require_ours_and_reference(compared: Mapping[str, _Compared]) -> None:
    """Raises: BackendError if sdopt or the reference failed."""
    for name in (OURS, REFERENCE):
        if compared[name].failed:
            raise BackendError(f"{name} itself cannot be measured: {compared[name].failed}")


def _time_in_turns(compared: Mapping[str, _Compared], setup: Setup, report: Report) -> dict[str, dict[str, Series]]:
    """The timings by side and component. Within each component the sides take turns."""
    timings: dict[str, dict[str, Series]] = {name: {} for name in compared}
    for component in COMPONENTS:
        calls = {name: side.calls[component] for name, side in compared.items() if component in side.calls}
        if not calls:
            continue
        report(f"  {component}: {', '.join(calls)}")
        remaining_warmup = setup.warmup - 1  # `_compare` has made one call
        for name, series in interleaved(calls, setup.rounds, remaining_warmup).items():
            timings[name][component] = series
    return timings


def _entry(compared: _Compared, case: Case, timings: Mapping[str, Series]) -> dict[str, Any]:
    """A side's entry in the result, still without its cold start."""
    side = compared.side
    parts: dict[str, list[float]] = {}
    for component, series in timings.items():
        for part, seconds in series.parts.items():
            parts[f"{component}.{part}"] = list(seconds)
    return {
        "name": compared.name,
        "kind": side.kind if side else "",
        "backend": side.backend if side else "",
        "precision": side.precision if side else "",
        "note": side.note if side else "",
        "versions": dict(side.versions) if side else {},
        "failed": compared.failed,
        "parity": dict(compared.parity),
        "quotable": compared.failed is None and record.quotable(compared.parity, case),
        "seconds": {component: list(series.seconds) for component, series in timings.items()},
        "parts": parts,
        "memory": {
            "peak_rss_bytes": None,
            "peak_device_bytes": None,
            "engine_bytes": dict(side.engine_bytes) if side else {},
        },
    }


def parity_db(
    expected: Mapping[str, Array | None],
    outputs: Mapping[str, Array | None],
    name: str,
    peak: float | None = None,
    half_level: float = 0.0,
) -> float | None:
    """The PSNR of one output against the expected one in dB; None if either is missing.

    An output that was rounded has levels. `half_level` is half the step between them, or 0 if nothing was rounded.
    Differences of up to half a step do not count.
    Raises: UsageError for different shapes; NumericsError for NaN or infinity.
    """
    reference, output = expected.get(name), outputs.get(name)
    if reference is None or output is None:
        return None
    if half_level:
        output = np.clip(reference, output - half_level, output + half_level)
    decibels = psnr(reference, output, peak)
    if decibels == -np.inf:
        raise NumericsError(f"{name}: an output has NaN or infinity, so it has no parity")
    return round(decibels, 2)


def starts_cold(entry: dict[str, Any]) -> bool:
    """Whether a side is started in fresh processes. A compiled side is not, and a note in its entry says so."""
    is_compiled = entry["kind"] == "diffusers" and Baseline.parse(entry["name"]).compiled
    if is_compiled:
        _add_note(entry, "not started cold, compiling takes minutes")
    return entry["failed"] is None and not is_compiled


def _add_note(entry: dict[str, Any], text: str) -> None:
    entry["note"] = f"{entry['note']}; {text}".lstrip("; ")


def add_cold_starts(
    entries: Sequence[dict[str, Any]], setup: Setup, request: Mapping[str, Any], report: Report
) -> None:
    """Start each side in fresh processes, and add their times and their memory to the entries."""
    if not setup.cold_rounds or not entries:
        return
    report(f"  cold_start: {', '.join(entry['name'] for entry in entries)}")
    peaks: dict[str, list[int]] = {entry["name"]: [] for entry in entries}

    def start(name: str) -> Callable[[], Sample]:
        def call() -> Sample:
            sample, peak = cold_start(command_of(name, setup.peers), request)
            if peak is not None:
                peaks[name].append(peak)
            return sample

        return call

    for entry in entries:
        try:
            start(entry["name"])()  # not timed; it brings the files into the system's cache
        except BackendError as error:
            del peaks[entry["name"]]
            _add_note(entry, f"cold start failed: {error}")
            report(f"  {entry['name']}: {entry['note']}")
    series = interleaved({name: start(name) for name in peaks}, setup.cold_rounds, warmup=0)
    for entry in entries:
        if entry["name"] not in series:
            continue
        cold_starts = series[entry["name"]]
        entry["seconds"]["cold_start"] = list(cold_starts.seconds)
        entry["parts"] |= {f"cold_start.{part}": list(seconds) for part, seconds in cold_starts.parts.items()}
        entry["memory"]["peak_rss_bytes"] = max(peaks[entry["name"]], default=None)
        if setup.device != "cpu":
            _, entry["memory"]["peak_device_bytes"] = machine.with_peak_device_bytes(start(entry["name"]))
