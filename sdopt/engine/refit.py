"""Other weights for engines of TensorRT that `sdopt build --refit lora` made.

    BUNDLE/engines/unet_step-3f2a9c01d4e5/
        engine.plan
        refit.json      the weights that TensorRT can change in the plan, by the names of the graph it was built from

A plan that is loaded with an overlay gets the bundle's own numbers with the overlay's changes, rounded once to the type
that the graph had. Each plan is loaded anew for another overlay, so nothing is left of the one before.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Protocol

import numpy as np

from sdopt.bundle.decode import decode
from sdopt.bundle.disk import parse_json, read_plain
from sdopt.bundle.files import ModelFolder
from sdopt.bundle.specs import Array, Float32
from sdopt.bundle.weight_names import Weight, parse
from sdopt.bundle.weights import BFLOAT16, FLOAT, FLOAT16, Weights, rounded
from sdopt.dataclass import dataclass
from sdopt.engine.store import Record, Stored
from sdopt.engine.trt_api import LoadedPlan, Typed
from sdopt.errors import BackendError, SdoptError

REFIT = "refit.json"
OPTION = "--refit lora"  # of `sdopt build`
KINDS = {"float32": FLOAT, "float16": FLOAT16, "bfloat16": BFLOAT16}
STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Constant:
    """A floating-point constant of a graph: its type, and its bytes in base64."""

    type: str
    base64: str

    def numbers(self) -> Array:
        """Raises: ValueError for another type, or for what is no base64."""
        if self.type not in KINDS:
            raise ValueError(f"type {self.type!r}")
        return np.frombuffer(b64decode(self.base64, validate=True), STORED[self.type])


@dataclass(frozen=True)
class Refittable:
    """What TensorRT can change in a plan: the name of each weight, and its type in the graph.

    `constants`: the graph's own, where the library can change all weights or none. It may need them beside a weight
    that it has joined with them.
    """

    weights: Mapping[str, str]
    constants: Mapping[str, Constant] = field(default_factory=dict[str, Constant])

    @staticmethod
    def read(path: Path) -> Refittable:
        """Raises: BackendError for a file that is no such table."""
        try:
            table: Refittable = decode(Refittable, parse_json(read_plain(path, MAX_BYTES)))
            unknown = {*table.weights.values()} - {*KINDS}
            if unknown:
                raise ValueError(f"types {', '.join(sorted(unknown))}")
            for constant in table.constants.values():
                constant.numbers()
            return table
        except (OSError, ValueError, SdoptError) as error:
            raise BackendError(f"{path} cannot be read: {error}; build the engine again") from error


class Changes(Protocol):
    """What is different; an overlay is one."""

    def changed(self, component: str, weights: Weights) -> Iterator[tuple[str, Float32]]:
        """Each parameter that has other numbers, and these."""
        ...


@dataclass(frozen=True, eq=False)
class NewWeights:
    """The weights of an engine with an overlay: the bundle's own, and what the overlay makes of them."""

    bundle: ModelFolder
    component: str  # of the engine, e.g. "unet_step"
    overlay: Changes

    def put_into(self, plan: LoadedPlan, record: Record, file: Path) -> None:
        """Give a loaded plan its new weights. `file`: its REFIT.

        Raises: BackendError where TensorRT refuses one; UsageError for numbers that float16 cannot hold; BundleError
        for a bundle that was changed since it was opened.
        """
        table = Refittable.read(file)
        own = self.bundle.component(graph_of(self.bundle, record))
        self.bundle.refuse_changed(own.name)
        base = Weights.of(own)
        plan.refit(self._changed(table, base, record), lambda name: _as_built(name, table, base))
        self.bundle.refuse_changed(own.name)

    def _changed(self, table: Refittable, base: Weights, record: Record) -> Iterator[tuple[str, Typed]]:
        parts: dict[str, list[Weight]] = {}
        for name in table.weights:
            weight = parse(name)
            if weight is not None:
                parts.setdefault(weight.parameter, []).append(weight)
        for parameter, numbers in self.overlay.changed(self.component, base):
            if parameter not in parts:
                raise BackendError(
                    f"{self.component}: this engine cannot change {parameter}; build it again: {record.rebuild_command}"
                )
            for weight in parts[parameter]:
                yield weight.name, _typed(weight, numbers, table.weights[weight.name])


def _as_built(name: str, table: Refittable, base: Weights) -> Typed | None:
    """A weight that the plan was built with; None for one that is not known."""
    if name in table.constants:
        return table.constants[name].type, table.constants[name].numbers()
    weight = parse(name)
    if weight is None or name not in table.weights or weight.parameter not in base.parameters:
        return None
    return _typed(weight, base.read(weight.parameter), table.weights[name])


def _typed(weight: Weight, parameter: Float32, kind: str) -> Typed:
    """What an initializer holds of a parameter, in its own type."""
    own = np.ascontiguousarray(weight.held(parameter), np.float32)
    return kind, rounded(own, KINDS[kind], weight.parameter)


def refittable(plans: Sequence[Stored]) -> list[Stored]:
    """Those whose weights can be changed.

    Raises: BackendError with the command that builds one, if there is none.
    """
    able = [plan for plan in plans if REFIT in plan.record.files]
    if able:
        return able
    record = plans[0].record
    raise BackendError(
        f"{record.component}: the weights of this engine cannot be changed, so it takes no LoRA. "
        f"Build one that does: {record.having(OPTION).rebuild_command}"
    )


def graph_of(bundle: ModelFolder, record: Record) -> str:
    """The component whose graph an engine was made from: "unet" of "unet_step"."""
    return next(name for name in bundle.components if bundle.component(name).graph.name in record.sources)
