"""A graph of opset 18 to 23 in the operators of opset 17, which is what TensorRT 8.6 parses."""

from __future__ import annotations

import onnx_ir as ir


def lower(model: ir.Model, *, ir_version: int = 8) -> ir.Model:
    """`model`, changed in place to opset 17 with the same results; float32 or float16-typed.

    Raises: UsageError naming the operators that have no form in opset 17.
    """
    raise NotImplementedError
