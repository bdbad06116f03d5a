"""Measure one case on every side: open all, compare their outputs, time them in turns, start them cold."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from sdopt.errors import BackendError, NumericsError, UsageError
from sdopt.metrics import psnr

Report = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What is measured beside what, and how often. `peers`: the command of each, by its name."""

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
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"{', '.join(twice)}: a side is named twice; they are {', '.join(names)}")
        if min(self.rounds, self.warmup, self.threads) < 1 or self.cold_rounds < 0:
            raise UsageError("allowed are 1 or more rounds, warm-up calls and threads, and 0 or more cold rounds")


def new_record(command: str, results: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A record of this machine, now."""
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
    """The result of a case, as a record holds it.

    Raises: what sdopt or the reference raises. Another side that fails becomes an entry that says why.
    """
    report(f"{case.name}: {case.width}x{case.height}, {case.steps} steps, guidance {case.guidance}")
    bundle = Bundle.open(setup.bundle)
    with tempfile.TemporaryDirectory(prefix="sdopt-bench-") as folder:
        latents, path = latents_of(case, bundle), Path(folder) / "latents.npy"
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
    """The entries of all sides, still without cold starts."""
    with ExitStack() as stack:
        ours = open_side(case, setup.bundle, setup.threads)
        stack.callback(ours.close)
        reference = DiffusersSide(REFERENCE, case, setup.checkpoint, setup.threads, setup.device)
        stack.callback(reference.close)
        opened: dict[str, Side | str] = {OURS: ours, REFERENCE: reference}
        for name in [*setup.baselines, *setup.peers]:
            if name in opened:
                continue
            side = _open(name, case, setup, request, report)
            opened[name] = side
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
        proven = {name: _prove(name, side, inputs, expected, case, report) for name, side in opened.items()}
        _refuse_failure(proven)
        warm = _warm(proven, setup, report)
        return [_entry(side, case, warm[name]) for name, side in proven.items()]


@dataclass(frozen=True)
class _Proven:
    """A side after its first calls: their parity with the reference, or why they failed."""

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
    except Exception as error:  # a library's own: what fails is told, and the others go on
        report(f"  {name} cannot be measured: {error}")
        return f"{type(error).__name__}: {error}"


def _prove(
    name: str, side: Side | str, inputs: Inputs, expected: Mapping[str, Array | None], case: Case, report: Report
) -> _Proven:
    """Call every component once. This call warms it up, and its output is compared with the reference."""
    unknown: dict[str, float | None] = {"picture_db": None, "unet_db": None}
    if isinstance(side, str):
        return _Proven(name, None, {}, unknown, side)
    try:
        calls = side.calls(inputs)
        outputs = _outputs(calls)
        parity = {
            "picture_db": parity_db(expected, outputs, "picture", peak=1.0, half_level=side.half_level),
            "unet_db": parity_db(expected, outputs, "step" if "step" in outputs else "unet"),
        }
    except Exception as error:  # a library's own: what fails is told, and the others go on
        report(f"  {name} cannot be measured: {error}")
        return _Proven(name, side, {}, unknown, f"{type(error).__name__}: {error}")
    if not record.quotable(parity, case):
        report(f"  {name}: {parity} is below the case's floor or cannot be compared; its speed is marked")
    return _Proven(name, side, calls, parity, None)


def _outputs(calls: Mapping[str, Call]) -> dict[str, Array | None]:
    return {name: call().output for name, call in calls.items()}


def _refuse_failure(proven: Mapping[str, _Proven]) -> None:
    for name in (OURS, REFERENCE):
        if proven[name].failed:
            raise BackendError(f"{name} itself cannot be measured: {proven[name].failed}")


def _warm(proven: Mapping[str, _Proven], setup: Setup, report: Report) -> dict[str, dict[str, Series]]:
    """Series by side and component; the sides take turns within each component."""
    series: dict[str, dict[str, Series]] = {name: {} for name in proven}
    for component in COMPONENTS:
        calls = {name: side.calls[component] for name, side in proven.items() if component in side.calls}
        if not calls:
            continue
        report(f"  {component}: {', '.join(calls)}")
        for name, taken in interleaved(calls, setup.rounds, setup.warmup - 1).items():
            series[name][component] = taken
    return series


def _entry(proven: _Proven, case: Case, warm: Mapping[str, Series]) -> dict[str, Any]:
    """A side of the result, still without its cold start."""
    side = proven.side
    parts: dict[str, list[float]] = {}
    for component, series in warm.items():
        for part, seconds in series.parts.items():
            parts[f"{component}.{part}"] = list(seconds)
    return {
        "name": proven.name,
        "kind": side.kind if side else "",
        "backend": side.backend if side else "",
        "precision": side.precision if side else "",
        "note": side.note if side else "",
        "versions": dict(side.versions) if side else {},
        "failed": proven.failed,
        "parity": dict(proven.parity),
        "quotable": proven.failed is None and record.quotable(proven.parity, case),
        "seconds": {component: list(series.seconds) for component, series in warm.items()},
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
    """The likeness of one output to the expected one in dB; None if either is missing.

    `half_level` is half the step between the levels of an output that was rounded, and 0 for one that was not.
    Differences of up to half a step count as none.
    Raises: UsageError for different shapes; NumericsError for NaN or infinity.
    """
    reference, output = expected.get(name), outputs.get(name)
    if reference is None or output is None:
        return None
    if half_level:
        output = np.clip(reference, output - half_level, output + half_level)
    likeness = psnr(reference, output, peak)
    if likeness == -np.inf:
        raise NumericsError(f"{name}: an output has NaN or infinity, so it has no parity")
    return round(likeness, 2)


def starts_cold(entry: dict[str, Any]) -> bool:
    """Whether a side is started in fresh processes. A compiled one is not, and gets a note that says so."""
    compiled = entry["kind"] == "diffusers" and Baseline.parse(entry["name"]).compiled
    if compiled:
        _add_note(entry, "not started cold, compiling takes minutes")
    return entry["failed"] is None and not compiled


def _add_note(entry: dict[str, Any], text: str) -> None:
    entry["note"] = f"{entry['note']}; {text}".lstrip("; ")


def add_cold_starts(
    entries: Sequence[dict[str, Any]], setup: Setup, request: Mapping[str, Any], report: Report
) -> None:
    """Add the cold starts and the memory of fresh processes to the entries."""
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
            start(entry["name"])()  # brings the files into memory
        except BackendError as error:
            del peaks[entry["name"]]
            _add_note(entry, f"cold start failed: {error}")
            report(f"  {entry['name']}: {entry['note']}")
    series = interleaved({name: start(name) for name in peaks}, setup.cold_rounds, warmup=0)
    for entry in entries:
        if entry["name"] not in series:
            continue
        taken = series[entry["name"]]
        entry["seconds"]["cold_start"] = list(taken.seconds)
        entry["parts"] |= {f"cold_start.{part}": list(seconds) for part, seconds in taken.parts.items()}
        entry["memory"]["peak_rss_bytes"] = max(peaks[entry["name"]], default=None)
        if setup.device != "cpu":
            _, entry["memory"]["peak_device_bytes"] = machine.with_peak_device_bytes(start(entry["name"]))
