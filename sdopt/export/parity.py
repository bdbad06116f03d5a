"""The parity gate: an exported graph, run by ONNX Runtime, against PyTorch in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdopt.bundle.files import Component
from sdopt.bundle.format import Parity
from sdopt.bundle.specs import Array
from sdopt.errors import ParityError
from sdopt.export.part import Part
from sdopt.metrics import psnr

FLOOR_DB = 80.0
Reference = dict[str, Array]  # the outputs of a component by name


def references(part: Part) -> list[Reference]:
    """What PyTorch makes of seeded inputs, at every size that the part names for the gate."""
    return [part.run(part.example(sizes, seed)) for seed, sizes in enumerate(part.sizes[1:])]


def measure(part: Part, graph: Path, expected: Sequence[Reference] | None = None) -> list[Parity]:
    """The parity of every output with `expected`; without it the part's `references` are made now.

    With `expected` the part needs no module any more, so that a large model is in memory once, as the graph.
    """
    from sdopt.engine.ort import OrtEngine  # the export side imports without ONNX Runtime

    expected = references(part) if expected is None else expected
    results: list[Parity] = []
    with OrtEngine(Component(part.name, graph, part.inputs, part.outputs), lean=True) as engine:
        for seed, (sizes, reference_outputs) in enumerate(zip(part.sizes[1:], expected, strict=True)):
            outputs = engine(**part.example(sizes, seed))
            for name, reference in reference_outputs.items():
                error = float(np.abs(outputs[name] - reference).max())
                results.append(Parity(dict(sizes), name, round(psnr(reference, outputs[name]), 1), error))
    return results


def gate(part: Part, results: Sequence[Parity], floor_db: float = FLOOR_DB) -> None:
    """Raises ParityError if any result is below the floor."""
    too_low = [r for r in results if not r.psnr_db >= floor_db]  # so that NaN is too low as well
    if too_low:
        lines = "; ".join(f"{r.output} at {r.sizes}: {r.psnr_db} dB, max error {r.max_error:.1e}" for r in too_low)
        raise ParityError(
            f"{part.name}: the graph is not the model: {lines}; the floor is {floor_db} dB. Nothing was written. "
            "Try --opset 18, or --no-verify to look at the graph."
        )
