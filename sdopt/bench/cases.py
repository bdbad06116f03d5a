"""Cases: what is measured, as data. `benchmarks/cases.toml` has one table for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from sdopt.bundle.decode import DecodeError, Lines, decode, one_of, within
from sdopt.bundle.disk import parse_json, parse_toml
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import Positive
from sdopt.bundle.precision import precision_word
from sdopt.errors import UsageError, choices

PRECISIONS = ("fp32", "bf16", "fp16")  # of sdopt's engines
MEMORY = ("fast", "low")
# Precision -> floors in dB: (the picture, one call of the UNet); what a rounding costs decides them.
# The emoji's engines, computed by `sdopt.build.simulate` on a processor, guidance 4: fp16 70.8 and 66.3 (the UNet's
# worst of three timesteps, after guidance), bf16 51.5 and 47.7: 18 dB lower, 6 for each of the 3 bits that it lacks.
# The floors of fp16 lie 26 and 16 dB below: a UNet of Stable Diffusion rounds several times as often (about 5 dB, as
# errors add like a random walk), a guidance of 7.5 in place of 4 makes them larger by at most 6 dB, and a loop lets
# them grow. A defect (a lost bias, a wrong layout, an overflow) ends below 20 dB.
# TF32 rounds what a product reads to the 11 bits of fp16 and nothing else, so fp16's floors hold for it.
FLOORS = {"fp32": (60.0, 80.0), "tf32": (45.0, 50.0), "fp16": (45.0, 50.0), "bf16": (27.0, 32.0)}


@dataclass(frozen=True)
class Case:
    """One picture to be made, and how near to PyTorch's in fp32 it has to be for its speed to be quoted.

    Units: pixels; floors in dB, of the picture and of one call of the UNet: those of `FLOORS` where a file gives none.
    """

    name: str
    model: str
    width: Positive
    height: Positive
    steps: Positive
    guidance: float
    batch: Positive = 1
    prompt: Lines = "a red apple on a blue background"
    backend: str = "auto"
    precision: Annotated[str, one_of(*PRECISIONS)] = "fp32"
    memory: Annotated[str, one_of(*MEMORY)] = "fast"
    picture_floor_db: float = 60.0
    unet_floor_db: float = 80.0

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    def on(self, backend: str, precision: str) -> Case:
        """The same picture on another backend, with the floors of the precision that it computes in."""
        picture, unet = floors(backend, precision)
        changes: dict[str, Any] = {"picture_floor_db": picture, "unet_floor_db": unet}
        return dataclasses.replace(self, backend=backend, precision=precision, **changes)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(entry: Any, where: str = "case") -> Case:
        """The case of an object with its fields; floors that it does not give are those of its precision.

        Raises: UsageError for a field that is missing, unknown or of the wrong type.
        """
        try:
            case: Case = decode(Case, _with_precision_word(entry), where)
        except DecodeError as error:
            raise UsageError(str(error)) from error
        given = {name: getattr(case, name) for name in ("picture_floor_db", "unet_floor_db") if name in entry}
        return dataclasses.replace(case.on(case.backend, case.precision), **given)

    @staticmethod
    def of_bundle(bundle: Bundle) -> Case:
        """The picture that a bundle makes when nothing else is asked for."""
        d = bundle.manifest.defaults
        model = bundle.manifest.name or "/".join(bundle.path.absolute().parts[-2:])
        return Case("default", model, d.width, d.height, d.num_inference_steps, d.guidance_scale)


def _with_precision_word(entry: Any) -> Any:
    """A case as it is written, its precision in the words of sdopt."""
    if not isinstance(entry, dict) or "precision" not in entry:
        return cast(Any, entry)
    fields = cast("dict[str, Any]", entry)
    return {**fields, "precision": precision_word(str(fields["precision"]))}


def floors(backend: str, precision: str) -> tuple[float, float]:
    """The floors in dB of the picture and of one call of the UNet.

    TensorRT leaves TF32 on, so that its "fp32" is TF32 in convolutions and products; no other backend does.
    """
    return FLOORS["tf32" if precision == "fp32" and backend.startswith("tensorrt") else precision]


def read_cases(path: Path) -> dict[str, Case]:
    """The cases of a TOML file, or of a JSON file of the same shape (Python 3.10 has no TOML reader), by name.

    Raises: UsageError with what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tables: Any = parse_json(text) if path.suffix == ".json" else parse_toml(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no cases can be read from it: {error}") from error
    if not isinstance(tables, dict):
        raise UsageError(f"{path}: a file of cases has one table for each, [NAME] with its fields")
    try:
        return {name: _case(name, table) for name, table in cast(dict[str, Any], tables).items()}
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _case(name: str, table: Any) -> Case:
    return Case.from_json({**table, "name": name} if isinstance(table, dict) else table, within("", name))


def pick(cases: Mapping[str, Case], names: list[str]) -> list[Case]:
    """The cases of these names, in this order.

    Raises: UsageError for a name that is not there.
    """
    for name in names:
        if name not in cases:
            raise UsageError(f"case {name!r} is not known; there are {choices(name, cases)}")
    return [cases[name] for name in names]
