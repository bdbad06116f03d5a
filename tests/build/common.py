"""Graphs run as they stand, on ONNX Runtime, without its optimizations where rounding matters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from sdopt.build import graph
from sdopt.specs import Array, TensorSpec


def session(model: ir.Model | Path, folder: Path | None = None, *, optimize: bool = True) -> Any:
    """An ONNX Runtime session of a model, on one thread."""
    path = model
    if not isinstance(model, Path):
        assert folder is not None
        path = folder / f"{model.graph.name}-{id(model)}.onnx"
        graph.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(given: Any, arrays: Mapping[str, Array]) -> dict[str, Array]:
    names = [output.name for output in given.get_outputs()]
    return dict(zip(names, given.run(names, dict(arrays)), strict=True))


def example(inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Random arrays of these shapes: normal, but for a timestep and for token ids."""
    rng, arrays = np.random.default_rng(seed), dict[str, Array]()
    for spec in inputs:
        shape = tuple(d if isinstance(d, int) else sizes[d] for d in spec.shape)
        if spec.dtype.startswith("int"):
            arrays[spec.name] = rng.integers(0, 50, shape).astype(spec.dtype)
        elif spec.name == "timestep":
            arrays[spec.name] = np.linspace(400.5, 700, *shape, dtype=np.float32)
        else:
            arrays[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return arrays


def psnr(reference: Array, other: Array) -> float:
    """20 log10(max |reference| / RMSE) in dB; 200 where they are equal, -inf where one is not finite."""
    error = np.sqrt(np.mean(np.square(np.subtract(other, reference, dtype=np.float64))))
    if not np.isfinite(error):
        return -np.inf
    return float(min(200.0, 20 * np.log10(np.abs(reference).max() / error))) if error else 200.0
