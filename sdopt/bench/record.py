"""The record of one run of `sdopt bench`: a JSON file with the machine, the versions and every single timing.

It holds nothing that can be computed from the rest, but for one verdict, `quotable`. Reading is strict: the file has
exactly the keys of the classes below, and a verdict that does not follow from the parity beside it is refused.
Schema 1 had other words for precision; such a file is read as schema 2.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from sdopt.bench.cases import Case
from sdopt.bench.sides import OURS
from sdopt.bundle.decode import DecodeError, Json, Lines, Rule, decode, one_of
from sdopt.bundle.disk import parse_json, read_given, write_named
from sdopt.bundle.precision import with_precision_words
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError

SCHEMA = 2
MAX_BYTES = 64 << 20


Seconds = Annotated[
    tuple[Annotated[float, Rule("a number above 0", lambda value: value > 0)], ...],
    Rule("a list of one timing or more", lambda value: len(value) > 0),
]


@dataclass(frozen=True)
class Parity:
    """How near a side's outputs are to those of eager PyTorch in fp32. None if they cannot be compared."""

    picture_db: float | None
    unet_db: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes. None if they were not measured."""

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
    failed: Lines | None  # why there are no timings; None if there are
    parity: Parity
    quotable: bool  # the verdict of `quotable` below
    seconds: Mapping[str, Seconds]  # by component, round by round
    parts: Mapping[str, Seconds]  # seconds of a part of a component: "unet.device", "cold_start.import"
    memory: Memory


@dataclass(frozen=True)
class BundleEntry:
    """The bundle that was measured."""

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
    """The machine, as `sdopt.bench.machine` describes it."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    release: str
    architecture: str
    load_before: float


@dataclass(frozen=True)
class RecordFile:
    """The whole file."""

    schema: int
    created: str
    command: Lines
    commit: str | None
    machine: MachineEntry
    gpu: Mapping[str, str] | None
    versions: Mapping[str, str]
    results: tuple[ResultEntry, ...]


# The same as JSON objects, which is how the rest of the package reads a record once `check` has passed it.
BenchRecord = Mapping[str, Any]  # RecordFile
Result = Mapping[str, Any]  # ResultEntry
SideResult = Mapping[str, Any]  # SideEntry


def quotable(parity: Mapping[str, float | None], case: Case) -> bool:
    """Whether a side's speed may be quoted: its picture could be compared, and all its parities reach the floors."""
    floors = {"picture_db": case.picture_floor_db, "unet_db": case.unet_floor_db}
    if parity["picture_db"] is None:
        return False
    return all(value is None or value >= floors[name] for name, value in parity.items())


def check(record: Any) -> BenchRecord:
    """Check that `record` is a record of this schema, and return it.

    Raises: UsageError that says what is wrong and where.
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
            may_be_quoted = side.failed is None and quotable(vars(side.parity), case)
            if side.quotable != may_be_quoted:
                where = f"record.results[{i}], side {side.name}"
                raise UsageError(f"{where}: quotable is {side.quotable}, its parity {side.parity} says otherwise")
    return cast(BenchRecord, record)


def read(path: Path) -> BenchRecord:
    """The record in a file.

    Raises: UsageError if it is not a record, or of an unknown schema.
    """
    try:
        record = parse_json(read_given(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no record of a benchmark: {error}") from error
    try:
        return check(_upgraded(record))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _upgraded(record: Any) -> Any:
    """A record of schema 1 as one of schema 2: precisions are named in the words of today."""
    if not isinstance(record, dict) or cast("dict[str, Any]", record).get("schema") != 1:
        return cast(Any, record)
    changed = copy.deepcopy(cast("dict[str, Any]", record))
    for result in _objects(changed.get("results")):
        for case in _objects([result.get("case")]):
            _upgrade_words(case, "precision")
        for side in _objects(result.get("sides")):
            _upgrade_words(side, "name", "precision")
    return {**changed, "schema": SCHEMA}


def _upgrade_words(fields: dict[str, Any], *names: str) -> None:
    """Put the words of today for precisions into the fields of these names."""
    for name in names:
        if name in fields:
            fields[name] = with_precision_words(str(fields[name]))


def _objects(entries: Any) -> list[dict[str, Any]]:
    """The objects of a list. Entries of other types are left out here, and refused when the record is checked."""
    items = cast("list[Any]", entries) if isinstance(entries, list) else []
    return [item for item in items if isinstance(item, dict)]


def write(path: Path, record: BenchRecord) -> None:
    """Check a record and write it. The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_named(path, json.dumps(check(record), indent=1, allow_nan=False) + "\n")
