"""Passes in the tests: small sizes, one thread, files that go away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from sdopt import graph
from sdopt.build.examples import example
from sdopt.build.simulate import outputs_of, session, simulate_half
from sdopt.bundle.specs import Array
from sdopt.metrics import psnr

SIZES = {
    "batch": 2,
    "images": 2,
    "tokens": 7,
    "extra_tokens": 1,
    "latent_height": 8,
    "latent_width": 6,
    "height": 64,
    "width": 48,
}


def checked(model: ir.Model, folder: Path) -> Path:
    """The file of a model that the checker has accepted."""
    path = folder / f"{model.graph.name}-{id(model)}.onnx"
    graph.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    return path


def opened(model: ir.Model, folder: Path, *, optimize: bool = True) -> Any:
    """An ONNX Runtime session of a model."""
    return session(checked(model, folder), optimize=optimize, threads=1)


def inputs_of(path: Path, sizes: Mapping[str, int] = SIZES) -> dict[str, Array]:
    return example(graph.specs(graph.load(path))[0], sizes)


def outputs(model: ir.Model, arrays: Mapping[str, Array], folder: Path) -> dict[str, Array]:
    return outputs_of(opened(model, folder), arrays)


def half_outputs(model: ir.Model, arrays: Mapping[str, Array], folder: Path) -> dict[str, Array]:
    """The outputs of a graph that `half` made, with every rounding."""
    checked(model, folder)
    return outputs_of(opened(simulate_half(model), folder, optimize=False), arrays)


def parity(source: Path, change: Callable[[ir.Model], Any], folder: Path, *, half: bool = False) -> float:
    """dB between a graph and what `change` makes of it, the worst of its outputs."""
    arrays, model = inputs_of(source), graph.load(source)
    change(model)
    wanted = outputs(graph.load(source), arrays, folder)
    actual = (half_outputs if half else outputs)(model, arrays, folder)
    return min(psnr(wanted[name], actual[name]) for name in wanted)
