"""Cases: what is measured, as data. `benchmarks/cases.toml` has one table for each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sdopt.bundle import Bundle
from sdopt.errors import UsageError, choices

PRECISIONS = ("float32",)  # of sdopt's own engines
KINDS = {"str": (str,), "int": (int,), "float": (int, float)}  # what a field of this type may be


@dataclass(frozen=True)
class Case:
    """One picture to be made, and how near to PyTorch's in float32 it has to be for its speed to be quoted.

    Units: pixels; floors in dB, of the picture and of one call of the UNet.
    """

    name: str
    model: str
    width: int
    height: int
    steps: int
    guidance: float
    batch: int = 1
    prompt: str = "a red apple on a blue background"
    backend: str = "auto"
    precision: str = "float32"
    picture_floor_db: float = 60.0
    unet_floor_db: float = 80.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, KINDS[str(field.type)]):
                raise UsageError(f"case {self.name!r}: {field.name} = {value!r}; it takes {field.type}")
        low = [n for n in ("width", "height", "steps", "batch") if getattr(self, n) < 1]
        if low:
            raise UsageError(f"case {self.name!r}: {low[0]} = {getattr(self, low[0])}; allowed is 1 or more")
        if not all(map(math.isfinite, (self.guidance, self.picture_floor_db, self.unet_floor_db))):
            raise UsageError(f"case {self.name!r}: guidance and floors are finite numbers")
        if self.precision not in PRECISIONS:
            allowed = choices(self.precision, PRECISIONS)
            raise UsageError(f"case {self.name!r}: precision = {self.precision!r}; allowed: {allowed}")

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Case:
        """The case of an object with its fields.

        Raises: UsageError for a field that is missing, unknown or of the wrong type.
        """
        fields = {f.name: f.default for f in dataclasses.fields(Case)}
        for problem, given in (
            ("unknown", set(entry) - set(fields)),
            ("missing", {n for n, default in fields.items() if default is dataclasses.MISSING} - set(entry)),
        ):
            if given:
                raise UsageError(
                    f"case {entry.get('name')!r}: {problem} {', '.join(sorted(given))}; there are {', '.join(fields)}"
                )
        return Case(**entry)

    @staticmethod
    def of_bundle(bundle: Bundle) -> Case:
        """The picture that a bundle makes when nothing else is asked for."""
        d: Mapping[str, Any] = bundle.manifest["defaults"]
        model = str(bundle.manifest.get("name", "/".join(bundle.path.absolute().parts[-2:])))
        return Case("default", model, d["width"], d["height"], d["num_inference_steps"], float(d["guidance_scale"]))


def read_cases(path: Path) -> dict[str, Case]:
    """The cases of a TOML file, or of a JSON file of the same shape (Python 3.10 has no TOML reader), by name.

    Raises: UsageError with what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tables: Any = json.loads(text) if path.suffix == ".json" else _toml(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no cases can be read from it: {error}") from error
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in cast(dict[str, Any], tables).values()):
        raise UsageError(f"{path}: a file of cases has one table for each, [NAME] with its fields")
    return {name: Case.from_json({"name": name, **table}) for name, table in cast(dict[str, Any], tables).items()}


def pick(cases: Mapping[str, Case], names: list[str]) -> list[Case]:
    """The cases of these names, in this order.

    Raises: UsageError for a name that is not there.
    """
    for name in names:
        if name not in cases:
            raise UsageError(f"case {name!r} is not known; there are {choices(name, cases)}")
    return [cases[name] for name in names]


def _toml(text: str) -> Any:
    try:
        import tomllib  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("TOML needs Python 3.11; on 3.10 give the cases as a .json file of the same shape") from error
    return cast(Any, tomllib).loads(text)
