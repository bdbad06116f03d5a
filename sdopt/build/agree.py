"""Check that the rows of a batch agree: a picture must not depend on the others of its batch.

Some releases of TensorRT have made engines whose identical rows differ (NVIDIA/TensorRT#4796, #4813). So every engine
that is built where it can run is run on

    n identical rows               the n results must be equal
    one of these rows alone        its result must equal those
    a guided step of equal halves  the result must not depend on the guidance:  u + g (c - u) = u  where c = u

Results count as equal above a floor, because another batch size may use kernels that add in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdopt.build.examples import example
from sdopt.bundle.joined import DEEP
from sdopt.bundle.specs import Array, Profile, TensorSpec
from sdopt.dataclass import dataclass
from sdopt.engine import Engine
from sdopt.errors import BackendError
from sdopt.metrics import psnr
from sdopt.samplers.packed import SCALARS

# In dB. Correct results differ by rounding. Relative to the largest value, a rounding is 2^-11 in fp16 and in TF32
# (which GPUs use for "fp32"), and 2^-8 in bf16. One rounding leaves 66 and 48 dB. The hundreds of roundings of a UNet
# leave about 60 and 40, as tests/build/test_half.py measures between half and float32. The floors are 20 and 15 dB
# lower, for deeper models. Unrelated rows are below 20 dB.
FLOOR_DB = {"fp32": 40.0, "fp16": 40.0, "bf16": 25.0}
GUIDANCE = 4.0  # it makes the difference of the halves 4 times as large: 12 dB
BATCHES = ("batch", "images", "pictures")
ROWS = 4  # rows to compare, at most


@dataclass(frozen=True)
class Agreement:
    """The likeness in dB of the worst output in each check. None: the engine's profile does not allow the check."""

    rows: float | None = None
    alone: float | None = None
    halves: float | None = None

    def to_json(self) -> dict[str, float]:
        return {name: round(db, 1) for name, db in vars(self).items() if db is not None}


def check_rows(name: str, engine: Engine, profiles: Sequence[Profile], precision: str) -> Agreement:
    """The agreement of rows in the worst of the profiles.

    Raises: BackendError with the likeness if it is below the floor.
    """
    measured = [measure(engine, profile) for profile in profiles]
    worst = Agreement(
        rows=_least([agreement.rows for agreement in measured]),
        alone=_least([agreement.alone for agreement in measured]),
        halves=_least([agreement.halves for agreement in measured]),
    )
    floor = FLOOR_DB.get(precision, FLOOR_DB["bf16"])  # beside 8 bits, the rest may be bf16
    floors = {"rows": floor, "alone": floor, "halves": floor - 20 * np.log10(GUIDANCE)}
    meanings = {
        "rows": "identical rows of one batch give different results",
        "alone": "a row gives another result in a batch than alone",
        "halves": "equal halves of guidance give different results",
    }
    for kind, db in worst.to_json().items():
        if db < floors[kind]:
            raise BackendError(
                f"{name}: {meanings[kind]}: they are alike to {db:.1f} dB, and {floor:.0f} dB is what {precision} "
                "allows. This is a fault of the library that built it, and the engine is not kept. Build with another "
                "version of the library, with --static --profile batch=1, or with --opt-level 2"
            )
    return worst


def measure(engine: Engine, profile: Profile) -> Agreement:
    """The agreement of rows at the best lengths of one profile."""
    inputs = engine.inputs
    least, most = _counts(profile)
    lengths = {name: best for name, (_, best, _) in profile.ranges.items()}
    one = example(inputs, {**lengths, **dict.fromkeys(least, 1)})
    agreement = Agreement()
    count = most.get("batch", max(most.values(), default=1))  # an adapter's engine has one of the others alone
    if count > 1:
        outputs = engine(**_repeated(inputs, one, most))
        rows = [_row(engine.outputs, outputs, k) for k in range(count)]
        agreement = replace(agreement, rows=min(alike(rows[0], row) for row in rows[1:]))
        if set(least.values()) == {1}:
            agreement = replace(agreement, alone=min(alike(engine(**one), row) for row in rows))
    if any(name.startswith("negative_") for name in one):
        agreement = replace(agreement, halves=_halves(engine, _repeated(inputs, one, least)))
    return agreement


def _counts(profile: Profile) -> tuple[dict[str, int], dict[str, int]]:
    """(the smallest batch, the batch to compare). The rows of prompts are a multiple of the rows of pictures."""
    ranges = {name: profile.ranges[name] for name in BATCHES if name in profile.ranges}
    least = {name: low for name, (low, _, _) in ranges.items()}
    most = {name: max(low, min(ROWS, high)) for name, (low, _, high) in ranges.items()}
    if {"batch", "images"} <= {*ranges}:
        most["images"] = least["images"]
        most["batch"] -= most["batch"] % most["images"]
    return least, most


def _halves(engine: Engine, arrays: dict[str, Array]) -> float:
    """How alike the results of a guided step of equal halves are at two guidance scales."""
    equal = {name: arrays[name.removeprefix("negative_")] for name in arrays}
    if DEEP in equal:  # it has both halves
        equal[DEEP] = np.repeat(equal[DEEP][1:], 2, 0)
    row = np.array(equal["row"], np.float32)
    row[:, SCALARS.index("guidance")] = GUIDANCE
    return alike(engine(**equal), engine(**{**equal, "row": row}))


def _repeated(specs: Sequence[TensorSpec], arrays: Mapping[str, Array], counts: Mapping[str, int]) -> dict[str, Array]:
    """The arrays, which have one row each, with as many rows as `counts` gives for their batch."""
    repeated = dict(arrays)
    for spec in specs:
        for axis, dimension in enumerate(spec.shape):
            if dimension in BATCHES:
                repeated[spec.name] = np.repeat(arrays[spec.name], counts[str(dimension)], axis)
    return repeated


def _row(specs: Sequence[TensorSpec], arrays: Mapping[str, Array], index: int) -> dict[str, Array]:
    """One row of every output."""
    row = dict(arrays)
    for spec in specs:
        for axis, dimension in enumerate(spec.shape):
            if dimension in BATCHES:
                row[spec.name] = np.take(arrays[spec.name], [index], axis)
    return row


def alike(expected: Mapping[str, Array], outputs: Mapping[str, Array]) -> float:
    """The likeness of the worst output, in dB."""
    return min(psnr(expected[name], outputs[name]) for name in expected)


def _least(values: Sequence[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
