"""What the tests of graph passes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from sdopt.bundle.specs import Array

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def run(model: ir.Model, folder: Path, x: Array) -> Array:
    """The one output of `model`, whose one input is x, on ONNX Runtime."""
    ir.save(model, folder / "g.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(folder / "g.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
