"""The JSON file of a run: machine, versions, and every single timing. What can be computed from it is not in it.

It is read as strictly as it is written: the classes below, no key more or less, and a verdict that does not follow from
the parity beside it is refused. Schema 1 had other words for precision; it is read as schema 2.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from sdopt.bench.cases import Case
from sdopt.bench.sides import OURS
from sdopt.bundle.decode import DecodeError, Json, Lines, Rule, decode, one_of
from sdopt.bundle.disk import parse_json, write_whole
from sdopt.bundle.precision import with_precision_words
from sdopt.errors import UsageError

SCHEMA = 2
MAX_BYTES = 64 << 20


Seconds = Annotated[
    tuple[Annotated[float, Rule("a number above 0", lambda value: value > 0)], ...],
    Rule("a list of one timing or more", lambda value: len(value) > 0),
]


@dataclass(frozen=True)
class Parity:
    """How near a side's outputs are to those of eager PyTorch in fp32; None: they cannot be compared."""

    picture_db: float | None
    unet_db: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes; None: not measured."""

    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    engine_bytes: Mapping[str, int]


@dataclass(frozen=True)
class SideEntry:
    """What was measured of one side."""

    name: str
    kind: Annotated[str, one_of("sdopt", "diffusers", "peer", "")]
    backend: str
    precision: str
    note: Lines
    versions: Mapping[str, str]
    failed: Lines | None  # why there are no timings
    parity: Parity
    quotable: bool  # all that can be compared is above the case's floors, and the picture can
    seconds: Mapping[str, Seconds]  # by component, round by round
    parts: Mapping[str, Seconds]  # "unet.device": by CUDA events; "cold_start.import": of the whole
    memory: Memory


@dataclass(frozen=True)
class BundleEntry:
    """Which bundle it was."""

    digest: str
    family: str


@dataclass(frozen=True)
class ResultEntry:
    """One case on every side."""

    case: Mapping[str, Json]
    bundle: BundleEntry
    threads: int
    device: str
    sides: tuple[SideEntry, ...]


@dataclass(frozen=True)
class MachineEntry:
    """The machine, as `sdopt.bench.machine` tells."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    release: str
    architecture: str
    load_before: float


@dataclass(frozen=True)
class RecordFile:
    """All of the file."""

    schema: int
    created: str
    command: Lines
    commit: str | None
    machine: MachineEntry
    gpu: Mapping[str, str] | None
    versions: Mapping[str, str]
    results: tuple[ResultEntry, ...]


Record = Mapping[str, Any]


def quotable(parity: Mapping[str, float | None], case: Case) -> bool:
    """Whether a side's speed may be quoted: its picture is PyTorch's, and so is its UNet where it can be called."""
    floors = {"picture_db": case.picture_floor_db, "unet_db": case.unet_floor_db}
    return parity["picture_db"] is not None and all(v is None or v >= floors[k] for k, v in parity.items())


def check(record: Any) -> Record:
    """The record, once it is one of schema 1.

    Raises: UsageError with the place and what is wrong there.
    """
    schema = cast(dict[str, Any], record).get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"schema {schema!r}; this sdopt reads records of schema {SCHEMA}. Measure again.")
    try:
        file: RecordFile = decode(RecordFile, record, "record")
    except DecodeError as error:
        raise UsageError(str(error)) from error
    for i, result in enumerate(file.results):
        case = Case.from_json(result.case, f"record.results[{i}].case")
        names = [side.name for side in result.sides]
        if names[:1] != [OURS] or len(set(names)) != len(names):
            raise UsageError(f"record.results[{i}]: its sides are {names}; sdopt comes first, and each once")
        for side in result.sides:
            if side.quotable != (side.failed is None and quotable(vars(side.parity), case)):
                where = f"record.results[{i}], side {side.name}"
                raise UsageError(f"{where}: quotable is {side.quotable}, its parity {side.parity} says otherwise")
    return cast(Record, record)


def read(path: Path) -> Record:
    """The record in a file.

    Raises: UsageError if it is none, or not of this schema.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        record = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no record of a benchmark: {error}") from error
    try:
        return check(_upgraded(record))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _upgraded(record: Any) -> Any:
    """A record of schema 1 as one of schema 2, in the places where a precision is named."""
    if not isinstance(record, dict) or cast("dict[str, Any]", record).get("schema") != 1:
        return cast(Any, record)
    changed = copy.deepcopy(cast("dict[str, Any]", record))
    for result in _objects(changed.get("results")):
        _rename(result.get("case"), "precision")
        for side in _objects(result.get("sides")):
            _rename(side, "name", "precision")
    return {**changed, "schema": SCHEMA}


def _rename(entry: Any, *names: str) -> None:
    for fields in _objects([entry]):
        fields.update({name: with_precision_words(str(fields[name])) for name in names if name in fields})


def _objects(entries: Any) -> list[dict[str, Any]]:
    """The objects of a list; what is something else is refused when the record is checked."""
    items = cast("list[Any]", entries) if isinstance(entries, list) else []
    return [item for item in items if isinstance(item, dict)]


def write(path: Path, record: Record) -> None:
    """Write a record, checked; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(check(record), indent=1, allow_nan=False) + "\n")
