"""Find where a half graph differs from the float32 one: compare every value of both on ONNX Runtime.

Both graphs are lowered first, so that attention scores and the statistics of norms become values of the graph.
`simulate_half` then makes the half one run on any machine. Values are compared in topological order, the outputs of
GROUP nodes in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt.build.half import MINUS_INFINITY, TYPES, HalfReport, half
from sdopt.build.lower import lower
from sdopt.build.simulate import outputs_of, session, simulate_half
from sdopt.bundle.specs import Array
from sdopt.bundle.unfinished import scratch
from sdopt.dataclass import dataclass
from sdopt.graph import BF16, F32, behind, is_float, load, name_of, save, weights
from sdopt.metrics import psnr

GROUP = 150  # nodes in a run: all their outputs are in memory at once
EXACT_DB = 200.0


@dataclass(frozen=True)
class Layer:
    """One node's output in half, compared with float32.

    island      the pattern that keeps the node in float32
    db          how alike the outputs are
    before_db   the least alike of the node's inputs, or one rounding if that is less: the best that `db` can be
    largest     the largest absolute value in float32
    """

    island: str
    operator: str
    output: str
    db: float
    before_db: float
    largest: float

    @property
    def drop(self) -> float:
        """How many dB this node loses."""
        return 0.0 if self.before_db == -np.inf else self.before_db - self.db


@dataclass(frozen=True)
class Diagnosis:
    """All layers in topological order. `outputs`: the likeness of the graph's outputs; `half`: the conversion."""

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
        losing = [layer for layer in self.layers if layer.drop > 0]
        return sorted(losing, key=lambda layer: -layer.drop)[:count]


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
    """Compute every value of the graph at `graph` from `arrays`, in float32 and in `dtype`, and compare them."""
    exact, coarse = load(graph), load(graph)
    done = half(coarse, dtype=dtype, islands=islands, attention=attention)
    lower(exact)
    simulate_half(lower(coarse))
    with scratch() as folder:
        for name, model in (("exact", exact), ("coarse", coarse)):
            save(model, folder / f"{name}.onnx")
        nodes = _comparable(exact, coarse)
        compared: dict[str, _Compared] = {}
        for start in range(0, len(nodes), GROUP):
            names = [name_of(value) for node in nodes[start : start + GROUP] for value in node.outputs]
            report(f"{min(start + GROUP, len(nodes))} of {len(nodes)} nodes")
            wanted, got = (_values(folder / f"{name}.onnx", names, arrays) for name in ("exact", "coarse"))
            for name in names:
                compared[name] = _compare(wanted[name], got[name], TYPES[dtype])
    layers = tuple(_layer(node, value, compared) for node in nodes for value in node.outputs)
    output_names = [name_of(value) for value in exact.graph.outputs]
    outputs = {name: compared[name].db for name in output_names if name in compared}
    return Diagnosis(layers, outputs, done, floor_db)


def _comparable(exact: ir.Model, coarse: ir.Model) -> list[ir.Node]:
    """The nodes whose floating-point outputs both graphs have under one name."""
    in_half = {name_of(value) for node in coarse.graph for value in node.outputs}
    names = in_half - {name_of(value) for value in weights(exact)}

    def comparable(value: ir.Value) -> bool:
        return is_float(value) and name_of(value) in names

    return [node for node in exact.graph if all(comparable(value) for value in node.outputs)]


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
class _Compared:
    """One value of both graphs: how alike they are, how alike after one rounding alone, the largest number."""

    db: float = EXACT_DB
    best: float = EXACT_DB
    largest: float = 0.0


def _compare(wanted: Array, got: Array, dtype: ir.DataType) -> _Compared:
    """Compare a value, except where a mask has minus infinity or the number that stands for it."""
    counted = (wanted > MINUS_INFINITY) & np.isfinite(wanted)
    if not counted.any():
        return _Compared()
    wanted, got = wanted[counted], got[counted].astype(np.float32)
    with np.errstate(over="ignore"):
        best = psnr(wanted, wanted.astype(dtype.numpy()).astype(np.float32))
    return _Compared(psnr(wanted, got), best if np.isfinite(best) else EXACT_DB, float(np.abs(wanted).max()))


def _layer(node: ir.Node, value: ir.Value, compared: Mapping[str, _Compared]) -> Layer:
    """The layer of one output of a lowered node."""
    output = compared[name_of(value)]
    names = [name_of(source) for source in node.inputs if source is not None]
    inputs = [compared[name].db for name in names if name in compared]
    island = name_of(node).partition("/")[0]  # the node of the bundle's graph that it was lowered from
    return Layer(island, node.op_type, name_of(value), output.db, min([*inputs, output.best]), output.largest)
