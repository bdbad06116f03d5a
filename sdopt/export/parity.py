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
    """What PyTorch computes from seeded inputs, at each of the sizes that the part has for the gate."""
    return [part.run(part.example(sizes, seed)) for seed, sizes in enumerate(part.sizes[1:])]


def measure(part: Part, graph: Path, expected: Sequence[Reference] | None = None) -> list[Parity]:
    """The parity of every output with `expected`, or with the part's `references` if `expected` is not given.

    If it is given, the part's module may have been released, so that a large model is in memory only once.
    """
    from sdopt.engine.ort import OrtEngine  # the export side imports without ONNX Runtime

    expected = references(part) if expected is None else expected
    results: list[Parity] = []
    with OrtEngine(Component(part.name, graph, part.inputs, part.outputs), lean=True) as engine:
        for seed, (sizes, reference) in enumerate(zip(part.sizes[1:], expected, strict=True)):
            outputs = engine(**part.example(sizes, seed))
            for name, expected_output in reference.items():
                error = float(np.abs(outputs[name] - expected_output).max())
                results.append(Parity(dict(sizes), name, round(psnr(expected_output, outputs[name]), 1), error))
    return results


def gate(part: Part, results: Sequence[Parity], floor_db: float = FLOOR_DB) -> None:
    """Raises ParityError if any result is below the floor."""
    too_low = [result for result in results if not result.psnr_db >= floor_db]  # NaN is too low as well
    if too_low:
        lines = "; ".join(f"{r.output} at {r.sizes}: {r.psnr_db} dB, max error {r.max_error:.1e}" for r in too_low)
        raise ParityError(
            f"{part.name}: the graph is not the model: {lines}; the floor is {floor_db} dB. Nothing was written. "
            "Try --opset 18, or --no-verify to look at the graph."
        )
