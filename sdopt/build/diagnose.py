"""Where a half graph leaves the float32 one: every value of both, compared on ONNX Runtime.

Both graphs are lowered first, so that attention scores and the statistics of norms are values that can be seen, and the
half one is run as `simulate_half` makes it. Values are compared in topological order, some hundred to a run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt.build.half import MINUS_INFINITY, TYPES, HalfReport, half
from sdopt.build.lower import lower
from sdopt.build.simulate import outputs_of, session, simulate_half
from sdopt.bundle.specs import Array
from sdopt.graph import BF16, F32, behind, is_float, load, name_of, save, weights
from sdopt.metrics import psnr

GROUP = 150  # values to a run: they are all in memory at once
EXACT_DB = 200.0


@dataclass(frozen=True)
class Layer:
    """One node's output in half against float32.

    `db` is its likeness; `before_db` what it could be, given the worst of what the node reads and one rounding;
    `largest` its largest absolute value in float32; `island` the pattern that keeps the node in float32.
    """

    island: str
    operator: str
    output: str
    db: float
    before_db: float
    largest: float

    @property
    def drop(self) -> float:
        """How much of the likeness is lost in this node."""
        return 0.0 if self.before_db == -np.inf else self.before_db - self.db


@dataclass(frozen=True)
class Diagnosis:
    """Every layer in topological order; `outputs` are the graph's own in dB, `half` what the conversion did."""

    layers: tuple[Layer, ...]
    outputs: Mapping[str, float]
    half: HalfReport
    floor_db: float

    @property
    def first(self) -> Layer | None:
        """The first layer below the floor."""
        return next((layer for layer in self.layers if layer.db < self.floor_db), None)

    def worst(self, count: int = 5) -> list[Layer]:
        """The layers that lose most, the worst first."""
        return sorted((layer for layer in self.layers if layer.drop > 0), key=lambda layer: -layer.drop)[:count]


def diagnose(
    graph: Path,
    arrays: Mapping[str, Array],
    *,
    floor_db: float = 40.0,
    dtype: str = "float16",
    islands: Sequence[str] = (),
    attention: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Diagnosis:
    """Every value of the graph at `graph`, computed from `arrays` in float32 and in `dtype`, compared."""
    exact, coarse = load(graph), load(graph)
    done = half(coarse, dtype=dtype, islands=islands, attention=attention)
    lower(exact)
    simulate_half(lower(coarse))
    with tempfile.TemporaryDirectory(prefix="sdopt-diagnose-") as temporary:
        folder = Path(temporary)
        for name, model in (("exact", exact), ("coarse", coarse)):
            save(model, folder / f"{name}.onnx")
        nodes = _comparable(exact, coarse)
        found: dict[str, _Seen] = {}
        for start in range(0, len(nodes), GROUP):
            names = [name_of(value) for node in nodes[start : start + GROUP] for value in node.outputs]
            report(f"{min(start + GROUP, len(nodes))} of {len(nodes)} nodes")
            wanted, got = (_values(folder / f"{name}.onnx", names, arrays) for name in ("exact", "coarse"))
            found.update((name, _compare(wanted[name], got[name], TYPES[dtype])) for name in names)
    layers = tuple(_layer(node, value, found) for node in nodes for value in node.outputs)
    outputs = {name_of(value): found[name_of(value)].db for value in exact.graph.outputs if name_of(value) in found}
    return Diagnosis(layers, outputs, done, floor_db)


def _comparable(exact: ir.Model, coarse: ir.Model) -> list[ir.Node]:
    """The nodes whose floating-point outputs both graphs have under one name."""
    there = {name_of(value) for node in coarse.graph for value in node.outputs}
    constants = {name_of(value) for value in weights(exact)}
    return [
        node
        for node in exact.graph
        if all(
            is_float(value) and name_of(value) in there and name_of(value) not in constants for value in node.outputs
        )
    ]


def _values(path: Path, names: Collection[str], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Some values inside the graph at `path`."""
    model = load(path)
    inside = {name_of(value): value for node in model.graph for value in node.outputs}
    values = [inside[name] for name in names]
    model.graph.outputs[:] = [_wide(model, value) if value.dtype == BF16 else value for value in values]
    shown = path.with_name(f"{path.stem}-shown.onnx")
    ir.save(model, shown)  # the weights stay where they are, in the file beside it
    return dict(zip(names, outputs_of(session(shown), arrays).values(), strict=True))


def _wide(model: ir.Model, value: ir.Value) -> ir.Value:
    """A bfloat16 value in float32: NumPy has no bfloat16."""
    return behind(model, value)("Cast", [value], f"{name_of(value)}/shown", dtype=F32, to=int(F32.value))


@dataclass(frozen=True)
class _Seen:
    """One value of both graphs: how alike they are, how alike one rounding would leave them, the largest number."""

    db: float = EXACT_DB
    best: float = EXACT_DB
    largest: float = 0.0


def _compare(wanted: Array, got: Array, dtype: ir.DataType) -> _Seen:
    """The likeness of a value; what stands for minus infinity in a mask is left out."""
    seen = (wanted > MINUS_INFINITY) & np.isfinite(wanted)
    if not seen.any():
        return _Seen()
    wanted, got = wanted[seen], got[seen].astype(np.float32)
    with np.errstate(over="ignore"):
        best = psnr(wanted, wanted.astype(dtype.numpy()).astype(np.float32))
    return _Seen(psnr(wanted, got), best if np.isfinite(best) else EXACT_DB, float(np.abs(wanted).max()))


def _layer(node: ir.Node, value: ir.Value, found: Mapping[str, _Seen]) -> Layer:
    """A lowered node's name begins with that of the node of the bundle's graph that it comes from."""
    seen = found[name_of(value)]
    inputs = [found[name_of(v)].db for v in node.inputs if v is not None and name_of(v) in found]
    island = name_of(node).partition("/")[0]
    return Layer(island, node.op_type, name_of(value), seen.db, min([*inputs, seen.best]), seen.largest)
