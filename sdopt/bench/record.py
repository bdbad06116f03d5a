"""The JSON file of a run: machine, versions, and every single timing. What can be computed from it is not in it.

It is read as strictly as it is written: schema 1 below, no key more or less, and a verdict that does not follow from
the parity beside it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sdopt.bench.cases import Case
from sdopt.bench.sides import OURS
from sdopt.bundle.disk import write_whole
from sdopt.errors import UsageError

SCHEMA = 1
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Map:
    """An object with any keys, whose values are of one shape."""

    shape: Any


# A shape is a type, a list of one shape, an object with exactly these keys, or one of the two above.
SIDE: dict[str, Any] = {
    "name": str,
    "kind": str,  # sdopt, diffusers or peer
    "backend": str,
    "precision": str,
    "note": str,
    "versions": Map(str),
    "failed": Maybe(str),  # why there are no timings
    "parity": {"picture_db": Maybe(float), "unet_db": Maybe(float)},  # against eager-float32; null: cannot be compared
    "quotable": bool,  # all that can be compared is above the case's floors, and the picture can
    "seconds": Map([float]),  # by component, round by round
    "parts": Map([float]),  # "unet.device": by CUDA events; "cold_start.import": of the whole
    "memory": {"peak_rss_bytes": Maybe(int), "peak_device_bytes": Maybe(int), "engine_bytes": Map(int)},
}
RESULT: dict[str, Any] = {
    "case": Map((str, int, float)),
    "bundle": {"digest": str, "family": str},
    "threads": int,
    "device": str,
    "sides": [SIDE],
}
RECORD: dict[str, Any] = {
    "schema": int,
    "created": str,
    "command": str,
    "commit": Maybe(str),
    "machine": {
        "cpu": str,
        "cores": int,
        "memory_bytes": int,
        "system": str,
        "release": str,
        "architecture": str,
        "load_before": float,
    },
    "gpu": Maybe(Map(str)),
    "versions": Map(str),
    "results": [RESULT],
}
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
    _check(record, RECORD, "record")
    checked = cast(Record, record)
    for i, result in enumerate(cast(list[Record], checked["results"])):
        case = Case.from_json(result["case"])
        sides: list[Record] = result["sides"]
        names = [side["name"] for side in sides]
        if names[:1] != [OURS] or len(set(names)) != len(names):
            raise UsageError(f"record.results[{i}]: its sides are {names}; sdopt comes first, and each once")
        for side in sides:
            where = f"record.results[{i}], side {side['name']}"
            series: list[list[float]] = [*side["seconds"].values(), *side["parts"].values()]
            if not all(taken and min(taken) > 0 for taken in series):
                raise UsageError(f"{where}: a timing is not positive, or a component has none")
            if side["quotable"] != (side["failed"] is None and quotable(side["parity"], case)):
                raise UsageError(f"{where}: quotable is {side['quotable']}, its parity {side['parity']} says otherwise")
    return checked


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, Maybe):
        if value is not None:
            _check(value, shape.shape, where)
    elif isinstance(shape, Map):
        _expect(isinstance(value, dict), where, "an object", value)
        for key, entry in value.items():
            _check(entry, shape.shape, f"{where}.{key}")
    elif isinstance(shape, dict):
        keys = cast(dict[str, Any], shape)
        _expect(isinstance(value, dict), where, "an object", value)
        _expect(set(value) == set(keys), where, f"an object with {', '.join(sorted(keys))}", sorted(value))
        for key, inner in keys.items():
            _check(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        _expect(isinstance(value, list), where, "a list", value)
        for i, entry in enumerate(value):
            _check(entry, cast(Sequence[Any], shape)[0], f"{where}[{i}]")
    else:
        kinds = (int, float) if shape is float else shape
        _expect(isinstance(value, kinds) and isinstance(value, bool) == (shape is bool), where, _names(kinds), value)
        _expect(not isinstance(value, float) or math.isfinite(value), where, "a finite number", value)


def _expect(right: bool, where: str, wanted: str, value: Any) -> None:
    if not right:
        raise UsageError(f"{where} is {str(value)[:80]!r}; it has to be {wanted}")


def _names(kinds: Any) -> str:
    return " or ".join(k.__name__ for k in cast("tuple[type, ...]", kinds if isinstance(kinds, tuple) else (kinds,)))


def read(path: Path) -> Record:
    """The record in a file.

    Raises: UsageError if it is none, or not of this schema.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no record of a benchmark: {error}") from error
    try:
        return check(record)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def write(path: Path, record: Record) -> None:
    """Write a record, checked; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(check(record), indent=1, allow_nan=False) + "\n")
