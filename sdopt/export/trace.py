"""A torch module to standard ONNX: traced by torch.export, stripped, each weight in the smallest exact dtype."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError, UsageError
from sdopt.export import weights
from sdopt.export.guidance_prefix import share_guidance_prefix
from sdopt.export.part import Part
from sdopt.graph.linears import split_linears

OPSETS = (18, 19, 20, 21, 22, 23)
NARROW_ABOVE = 1024  # elements; a smaller tensor is not worth a Cast


def trace(part: Part, opset: int = 23) -> ir.Model:
    """The graph of a component: float32-typed, dynamic in every named dimension.

    Raises: UsageError for an opset that the exporter does not write; CheckpointError if tracing fails.
    """
    if opset not in OPSETS:
        raise UsageError(f"opset {opset}; allowed are {', '.join(map(str, OPSETS))}")
    arrays = part.example(part.sizes[0])
    inputs = {s.name: torch.from_numpy(arrays[s.name]) for s in part.inputs}
    try:
        with _quiet(), torch.no_grad():
            traced = torch.export.export(
                part.module, (), inputs, dynamic_shapes={s.name: _dynamic(s) for s in part.inputs}, strict=False
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=opset,
                input_names=[s.name for s in part.inputs],
                output_names=[s.name for s in part.outputs],
                verbose=False,
                optimize=False,
            )
            assert program is not None  # with dynamo=True and no file, the program is returned
            with weights.as_inputs(program.model, part):
                program.optimize()
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise CheckpointError(f"{part.name}: torch cannot trace it: {error}") from error
    model: ir.Model = program.model
    _strip(model)
    _name_dimensions(model, part)
    if part.shared:
        share_guidance_prefix(model, part.shared, part.name)
    split_linears(model)
    return model


def save(model: ir.Model, path: Path) -> str:
    """Write `path` and its weights beside it as `path`.data; the dtype that most of the weights are stored in."""
    stored = narrow(model)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=256)
    return stored


def narrow(model: ir.Model) -> str:
    """Store every float32 weight that fp16 holds exactly as fp16, with a Cast that is folded when a graph is loaded.

    So an fp16 checkpoint keeps its size, no value changes, and a weight keeps its name.
    Returns the dtype that most of the weights are stored in.
    """
    total = narrowed = 0
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < NARROW_ABOVE:
            continue
        total += tensor.size
        array = tensor.numpy()
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.array_equal(half, array):
            continue
        narrowed += tensor.size
        stored = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16))
        stored.const_value = ir.tensor(half, name=name)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del model.graph.initializers[name]
        cast.outputs[0].name = f"{name}/float32"
        model.graph.register_initializer(stored)
        model.graph.insert_before(model.graph[0], cast)
    return "float16" if narrowed * 2 > total else "float32"


def _dynamic(spec: TensorSpec) -> dict[int, Any]:
    """Axis to dynamic dimension; the trace finds out which of them are equal."""
    return {axis: torch.export.Dim.AUTO for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}


def _strip(model: ir.Model) -> None:
    """Drop what tells of the machine that exported, so that a graph is the same wherever it was made."""
    for owner in (model, model.graph, *model.functions.values()):
        owner.metadata_props.clear()
        owner.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()


def _name_dimensions(model: ir.Model, part: Part) -> None:
    """Give inputs and outputs the dimension names of the spec; the trace calls them s53 and the like."""
    for values, specs in ((model.graph.inputs, part.inputs), (model.graph.outputs, part.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.shape)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep the exporter's progress and warnings off the terminal; errors still raise."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export", "torch.utils", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
