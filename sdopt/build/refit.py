"""Engines whose weights can be changed later: which weights, and the table of them beside the engine."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt.build.agree import FLOOR_DB, alike
from sdopt.build.examples import example
from sdopt.bundle.decode import encode
from sdopt.bundle.specs import Float32, Profile
from sdopt.bundle.weights import Held, Weights, rounded
from sdopt.dataclass import dataclass
from sdopt.engine import Engine
from sdopt.engine.refit import KINDS, STORED, Constant, Refittable
from sdopt.errors import BackendError
from sdopt.graph import BF16, F16, F32, SHORT, converted, is_float, name_of, names, redirect, weights

LORA = "lora"  # the option's word for "the weights that a LoRA may touch"
MAX_CONSTANT = 1 << 16  # elements


def refittable(model: ir.Model, *, constants: bool) -> Refittable:
    """The parameters that a graph holds. `constants`: also its floating-point constants, with their numbers."""
    table, own = dict[str, str](), dict[str, Constant]()
    for name, value in model.graph.initializers.items():
        kind = SHORT[value.dtype] if is_float(value) and value.dtype is not None else ""
        if kind not in KINDS:
            continue
        if names.parse(name) is not None:
            table[name] = kind
        elif constants and value.const_value is not None and value.const_value.size <= MAX_CONSTANT:
            own[name] = Constant(kind, _base64(value.const_value, kind))
    return Refittable(table, own)


def widen_weights(model: ir.Model) -> None:
    """Give a weight that the bundle keeps in half, and a Cast widens, float32 numbers; the Cast goes.

    So an engine in float32 takes new numbers unrounded, and a library that computed the Cast once need not do so again.
    """
    for value in weights(model):
        casts = [user for user, _ in value.uses()]
        tensor = value.const_value
        if tensor is None or value.dtype not in (F16, BF16) or not casts:
            continue
        if all(node.op_type == "Cast" and node.outputs[0].dtype == F32 for node in casts):
            value.const_value = converted(tensor, F32, name_of(value))
            value.type = ir.TensorType(F32)
            for node in casts:
                redirect(node.outputs[0], value)
                model.graph.remove(node, safe=True)


def put_into(model: ir.Model, numbers: Iterable[tuple[Held, Float32]]) -> None:
    """Give weights of a bundle's graph other numbers: unrounded, where a Cast widened them.

    Raises: UsageError for numbers that float16 cannot hold.
    """
    widen_weights(model)
    for part, array in numbers:
        value = model.graph.initializers[part.name]
        assert value.dtype is not None
        own = rounded(array, value.dtype.value, part.weight.parameter)
        value.const_value = ir.Tensor(own, dtype=value.dtype, name=part.name)


def _base64(tensor: ir.TensorProtocol, kind: str) -> str:
    array = np.ascontiguousarray(tensor.numpy())
    return b64encode(array.view(STORED[kind]).tobytes()).decode()


@dataclass(frozen=True)
class Unchanged:
    """The bundle's own numbers for the weights of a table."""

    table: Refittable

    def changed(self, component: str, weights: Weights) -> Iterator[tuple[str, Float32]]:
        """Every parameter, with the numbers that it has."""
        held = {weight.parameter for weight in map(names.parse, self.table.weights) if weight is not None}
        return ((name, weights.read(name)) for name in weights.parameters if name in held)


def check_refit(
    name: str, opened: Callable[[Unchanged | None], Engine], table: Path, profile: Profile, precision: str
) -> float:
    """How alike an engine is, in dB, to itself after all of its weights were given anew.

    `opened`: the engine, with changes or without. `table`: its file.
    Raises: BackendError where they differ: then a LoRA would make a wrong picture without a word.
    """
    with opened(None) as engine:
        arrays = example(engine.inputs, {dimension: best for dimension, (_, best, _) in profile.ranges.items()})
        expected = engine(**arrays)
    with opened(Unchanged(Refittable.read(table))) as engine:
        db = alike(expected, engine(**arrays))
    if db < FLOOR_DB[precision]:
        raise BackendError(
            f"{name}: with its own weights given anew, its results are like those before to {db:.1f} dB only. This "
            "is a fault of the library that built it, and the engine is not kept. Build with another version of the "
            "library, or without --refit"
        )
    return round(db, 1)


def write(path: Path, table: Refittable) -> None:
    path.write_text(json.dumps(encode(table)) + "\n", encoding="utf-8")
