"""Rows of one batch must agree: a picture does not depend on those that are made beside it.

Some releases of TensorRT have made engines whose identical rows differ (NVIDIA/TensorRT#4796, #4813). Every engine that
is built where it can run is asked for

    n identical rows               and gives n equal results
    one of these rows alone        and gives the same result again
    a guided step of equal halves  and gives the same whatever the guidance is:  u + g (c - u) = u  where c = u

Equal means above a floor: another batch may take other kernels, which add in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdopt.build.examples import example
from sdopt.bundle.specs import Array, Profile, TensorSpec
from sdopt.engine import Engine
from sdopt.errors import BackendError
from sdopt.metrics import psnr
from sdopt.samplers.packed import SCALARS

# In dB. Two right results differ by their roundings: relative to the largest value, 2^-11 for each value in fp16 and in
# TF32 (what "fp32" is on a GPU), 2^-8 in bf16. That leaves 66 and 48 dB after one rounding; the hundreds of a UNet in
# turn leave about 60 and 40, as measured between half and float32 by tests/build/test_half.py. 20 and 15 dB below that
# are for deeper models. Rows that have nothing to do with one another are alike to less than 20 dB.
FLOOR_DB = {"fp32": 40.0, "fp16": 40.0, "bf16": 25.0}
GUIDANCE = 4.0  # it magnifies what the halves differ by 4 times: 12 dB
BATCHES = ("batch", "images")
ROWS = 4  # as many rows as show it


@dataclass(frozen=True)
class Agreement:
    """Likeness in dB, the worst of all outputs; None where the engine's profile allows no such call."""

    rows: float | None = None
    alone: float | None = None
    halves: float | None = None

    def to_json(self) -> dict[str, float]:
        return {name: round(db, 1) for name, db in vars(self).items() if db is not None}


def check_rows(name: str, engine: Engine, profiles: Sequence[Profile], precision: str) -> Agreement:
    """How well rows agree in the worst of the profiles.

    Raises: BackendError with what was measured, where they do not.
    """
    floor = FLOOR_DB[precision]
    found = [measure(engine, profile) for profile in profiles]
    worst = Agreement(**{kind: _least([getattr(a, kind) for a in found]) for kind in vars(Agreement())})
    meanings = {
        "rows": "identical rows of one batch give different results",
        "alone": "a row gives another result in a batch than alone",
        "halves": "equal halves of guidance give different results",
    }
    for kind, db in worst.to_json().items():
        if db < floor - (20 * np.log10(GUIDANCE) if kind == "halves" else 0):
            raise BackendError(
                f"{name}: {meanings[kind]}: they are alike to {db:.1f} dB, and {floor:.0f} dB is what {precision} "
                "allows. This is a fault of the library that built it, and the engine is not kept. Build with another "
                "version of the library, with --static --profile batch=1, or with --opt-level 2"
            )
    return worst


def measure(engine: Engine, profile: Profile) -> Agreement:
    """How well rows agree, at the best lengths of one profile."""
    inputs = engine.inputs
    least, most = _counts(profile)
    lengths = {name: best for name, (_, best, _) in profile.ranges.items()}
    one = example(inputs, {**lengths, **dict.fromkeys(least, 1)})
    found = Agreement()
    count = most.get("batch", 1)
    if count > 1:
        outputs = engine(**_repeated(inputs, one, most))
        rows = [_row(engine.outputs, outputs, k) for k in range(count)]
        found = replace(found, rows=min(_alike(rows[0], row) for row in rows[1:]))
        if set(least.values()) == {1}:
            found = replace(found, alone=min(_alike(engine(**one), row) for row in rows))
    if any(name.startswith("negative_") for name in one):
        found = replace(found, halves=_halves(engine, _repeated(inputs, one, least)))
    return found


def _counts(profile: Profile) -> tuple[dict[str, int], dict[str, int]]:
    """How many rows at least, and how many to compare; the prompts' rows are a multiple of the pictures'."""
    ranges = {name: profile.ranges[name] for name in BATCHES if name in profile.ranges}
    least = {name: low for name, (low, _, _) in ranges.items()}
    most = {name: max(low, min(ROWS, high)) for name, (low, _, high) in ranges.items()}
    if "images" in ranges:
        most["images"] = least["images"]
        most["batch"] -= most["batch"] % most["images"]
    return least, most


def _halves(engine: Engine, arrays: dict[str, Array]) -> float:
    """How alike a guided step of equal halves is at two scales of guidance."""
    equal = {n: arrays[n.removeprefix("negative_")] if n.startswith("negative_") else a for n, a in arrays.items()}
    row = np.array(equal["row"], np.float32)
    row[:, SCALARS.index("guidance")] = GUIDANCE
    return _alike(engine(**equal), engine(**{**equal, "row": row}))


def _repeated(specs: Sequence[TensorSpec], arrays: Mapping[str, Array], counts: Mapping[str, int]) -> dict[str, Array]:
    """Every array with its one row as often as `counts` says for its batch."""
    found = dict(arrays)
    for spec in specs:
        for axis, dimension in enumerate(spec.shape):
            if dimension in BATCHES:
                found[spec.name] = np.repeat(arrays[spec.name], counts[str(dimension)], axis)
    return found


def _row(specs: Sequence[TensorSpec], arrays: Mapping[str, Array], index: int) -> dict[str, Array]:
    """One row of every output."""
    found = dict(arrays)
    for spec in specs:
        for axis, dimension in enumerate(spec.shape):
            if dimension in BATCHES:
                found[spec.name] = np.take(arrays[spec.name], [index], axis)
    return found


def _alike(expected: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    return min(psnr(expected[name], found[name]) for name in expected)


def _least(values: Sequence[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
