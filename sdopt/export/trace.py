"""From a torch module to standard ONNX: trace it with torch.export, strip it, and store weights as short as exact."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError, UsageError, refuse_other, shown
from sdopt.export import weights
from sdopt.export.guidance_prefix import share_guidance_prefix
from sdopt.export.part import Part
from sdopt.graph import BF16, F16, F32, SHORT
from sdopt.graph.linears import split_linears
from sdopt.graph.permutations import transpose_permutations

OPSETS = (18, 19, 20, 21, 22, 23)
SHORTER = {F16: torch.float16, BF16: torch.bfloat16}  # the types that weights may be stored in
NARROW_ABOVE = 1024  # elements; a smaller tensor is not worth a Cast


def trace(part: Part, opset: int = 23) -> ir.Model:
    """The graph of a component in float32. Every named dimension is dynamic.

    Raises: UsageError for an opset that the exporter does not write; CheckpointError if tracing fails.
    """
    check_opset(opset)
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
    except Exception as error:  # of torch's exporter, or of the model's own code
        raise CheckpointError(f"{part.name}: torch cannot trace it: {error}") from error
    model: ir.Model = program.model
    _strip(model)
    _name_dimensions(model, part)
    if part.shared:
        share_guidance_prefix(model, part.shared, part.name)
    split_linears(model)
    transpose_permutations(model)
    return model


def check_opset(opset: int) -> None:
    """Raises: UsageError for an opset that the exporter does not write."""
    allowed = f"are {', '.join(map(str, OPSETS))}"
    refuse_other("opset", opset, int, allowed)
    if opset not in OPSETS:
        raise UsageError(f"opset = {shown(opset)}; allowed {allowed}", "opset")


def save(model: ir.Model, path: Path) -> str:
    """Write the graph to `path` and its weights to `path`.data. Returns the dtype that most weights are stored in."""
    stored = narrow(model)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=256)
    return stored


def narrow(model: ir.Model) -> str:
    """Store every float32 weight as fp16 or bf16 if its values stay exact. A Cast turns it back when a graph is loaded.

    So an fp16 or bf16 checkpoint keeps its size, no value changes, and a weight keeps its name.
    Returns the dtype that most weights are stored in.
    """
    sizes = Counter[ir.DataType]()
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != F32 or tensor.size < NARROW_ABOVE:
            continue
        dtype = _narrowest(tensor)
        sizes[dtype] += tensor.size
        if dtype == F32:
            continue
        stored = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        stored.const_value = ir.LazyTensor(
            partial(_narrowed, tensor, dtype), dtype, ir.Shape(tensor.shape.numpy()), name=name
        )
        cast = ir.node("Cast", [stored], {"to": F32.value})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del model.graph.initializers[name]
        cast.outputs[0].name = f"{name}/float32"
        model.graph.register_initializer(stored)
        model.graph.insert_before(model.graph[0], cast)
    return SHORT[max(sizes, key=lambda dtype: sizes[dtype], default=F32)]


def _narrowest(tensor: ir.TensorProtocol) -> ir.DataType:
    """The type that has all values of a float32 tensor: fp16, bf16 or float32."""
    numbers = torch.from_numpy(tensor.numpy())
    exact = (dtype for dtype, own in SHORTER.items() if torch.equal(numbers.to(own).float(), numbers))
    return next(exact, F32)


def _narrowed(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """A float32 tensor in a shorter type. torch converts four times as fast as NumPy."""
    short = torch.from_numpy(tensor.numpy()).to(SHORTER[dtype])
    return ir.Tensor(short.view(torch.int16).numpy().view(dtype.numpy()), dtype=dtype)


def _dynamic(spec: TensorSpec) -> dict[int, Any]:
    """Axis -> dynamic dimension. The trace finds out which of them are equal."""
    return {axis: torch.export.Dim.AUTO for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}


def _strip(model: ir.Model) -> None:
    """Remove all traces of the machine that exports, so that a graph is the same wherever it was made."""
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
    """Give the dimensions of inputs and outputs the names of the spec. In the trace they have names such as s53."""
    for values, specs in ((model.graph.inputs, part.inputs), (model.graph.outputs, part.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.shape)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """A context in which the exporter prints no progress and no warnings. Errors still raise."""
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
