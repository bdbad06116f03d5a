"""Cases: what is measured, as data. `benchmarks/cases.toml` has a table for each case."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from sdopt.bundle.decode import DecodeError, Lines, decode, one_of, within
from sdopt.bundle.disk import parse_json, parse_toml, read_given
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import Positive
from sdopt.bundle.precision import precision_word
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices

PRECISIONS = ("fp32", "bf16", "fp16")  # of sdopt's engines
MEMORY = ("fast", "low")
MAX_BYTES = 16 << 20  # of a file of cases
# Precision -> floors in dB: (the picture, one call of the UNet). They allow what rounding costs, and no defect.
# `sdopt.build.simulate` measured the emoji's engines on a processor with guidance 4. fp16 has 70.8 dB (picture) and
# 66.3 dB (the UNet's worst of three timesteps, after guidance). bf16 has 51.5 and 47.7 dB: 18 dB less, which is 6 dB
# for each of the 3 bits that it lacks.
# The floors of fp16 are 26 and 16 dB below these, for three reasons. A UNet of Stable Diffusion rounds several times as
# often, which costs about 5 dB, because errors add like a random walk. A guidance of 7.5 instead of 4 costs at most
# 6 dB. And errors grow in a loop. A defect (a lost bias, a wrong layout, an overflow) ends below 20 dB.
# TF32 rounds only the factors of a product, and to as many bits as fp16 has, so the floors of fp16 hold for it.
FLOORS = {"fp32": (60.0, 80.0), "tf32": (45.0, 50.0), "fp16": (45.0, 50.0), "bf16": (27.0, 32.0)}


@dataclass(frozen=True)
class Case:
    """One picture to make, and how near to PyTorch's in fp32 it has to be for its speed to be quoted.

    Sizes are in pixels. Floors are in dB, of the picture and of one call of the UNet. If a file gives no floors, they
    are those of `FLOORS`.
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
        """The same picture on another backend and in another precision, with the floors of both."""
        picture, unet = floors(backend, precision)
        changes: dict[str, Any] = {"picture_floor_db": picture, "unet_floor_db": unet}
        return dataclasses.replace(self, backend=backend, precision=precision, **changes)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(entry: Any, where: str = "case") -> Case:
        """The case in a JSON object. Floors that the object lacks are those of its precision.

        Raises: UsageError for a field that is missing, unknown or of the wrong type.
        """
        try:
            case: Case = decode(Case, _with_precision_word(entry), where)
        except DecodeError as error:
            raise UsageError(str(error)) from error
        own_floors = {name: getattr(case, name) for name in ("picture_floor_db", "unet_floor_db") if name in entry}
        return dataclasses.replace(case.on(case.backend, case.precision), **own_floors)

    @staticmethod
    def of_bundle(bundle: Bundle) -> Case:
        """The picture that a bundle makes by default."""
        defaults = bundle.manifest.defaults
        return Case(
            name="default",
            model=bundle.manifest.name or "/".join(bundle.path.absolute().parts[-2:]),
            width=defaults.width,
            height=defaults.height,
            steps=defaults.num_inference_steps,
            guidance=defaults.guidance_scale,
        )


def _with_precision_word(entry: Any) -> Any:
    """A case as a file has it, with its precision in the words of sdopt."""
    if not isinstance(entry, dict) or "precision" not in entry:
        return cast(Any, entry)
    fields = cast("dict[str, Any]", entry)
    return {**fields, "precision": precision_word(str(fields["precision"]))}


def floors(backend: str, precision: str) -> tuple[float, float]:
    """The floors in dB of the picture and of one call of the UNet.

    TensorRT, unlike all other backends, leaves TF32 on: its "fp32" is TF32 in convolutions and matrix products.
    """
    is_tf32 = precision == "fp32" and backend.startswith("tensorrt")
    return FLOORS["tf32" if is_tf32 else precision]


def read_cases(path: Path) -> dict[str, Case]:
    """The cases in a TOML file by name, or in a JSON file of the same form (Python 3.10 has no TOML reader).

    Raises: UsageError that says what is wrong.
    """
    try:
        text = read_given(path, MAX_BYTES).decode()
        tables: Any = parse_json(text) if path.suffix == ".json" else parse_toml(text)
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: there is no such file. The cases of sdopt are in benchmarks/cases.toml of its repository: work "
            "in a clone, or name a file with --cases FILE; without --case the bundle's own picture is measured"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no cases can be read from it: {error}") from error
    if not isinstance(tables, dict):
        raise UsageError(f"{path}: a file of cases has one table for each, [NAME] with its fields")
    try:
        return {name: _case(name, table) for name, table in cast(dict[str, Any], tables).items()}
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _case(name: str, table: Any) -> Case:
    entry: Any = table  # `from_json` refuses what is not a table
    if isinstance(table, dict):
        entry = {**cast("dict[str, Any]", table), "name": name}
    return Case.from_json(entry, within("", name))


def pick(cases: Mapping[str, Case], names: list[str]) -> list[Case]:
    """The cases of these names, in this order.

    Raises: UsageError for an unknown name.
    """
    for name in names:
        if name not in cases:
            raise UsageError(f"case {name!r} is not known; there are {choices(name, cases)}")
    return [cases[name] for name in names]
