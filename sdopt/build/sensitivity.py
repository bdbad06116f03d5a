"""How much the output of a component suffers from an error in one of its layers, for every layer.

The graph computes each layer's output, and beside it the same output rounded so coarsely that the rounding has the
power of the layer's error in int8. An input of the graph chooses, for each element of a batch, the layer whose output
is the rounded one. So one call answers for as many layers as its batch has elements. Errors of layers are nearly
independent, so that the error of several is their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.build.int8 import layers_of
from sdopt.build.simulate import outputs_of, session
from sdopt.bundle.files import Component
from sdopt.bundle.specs import Array, Float32, TensorSpec
from sdopt.graph import BOOL, F32, I64, Writer, redirect

LARGEST_EDGE = 16  # latents; larger ones are cropped: the question is which layers matter, not how much in all
CHOSEN, NO_LAYER = "rounded_layers", -1  # the input that chooses, and its value for none
BATCH = 16  # layers that one call answers for


def output_errors(
    component: Component, noises: Mapping[str, float], calls: Sequence[tuple[dict[str, Array], Float32]], folder: Path
) -> dict[str, float]:
    """For each layer, the power of the output's error over the output's, if this layer alone has its noise.

    `noises`: the mean square of each layer's error, by the name of its weight. `calls`: (inputs, anything); of each,
    one element of its batch is taken, in turn.
    """
    path = folder / f"{component.name}-rounded.onnx"
    graph.save(_with_roundings(component, noises), path)
    running, output = session(path, optimize=True), component.outputs[0].name
    layers = list(noises)
    errors = dict.fromkeys(layers, 0.0)
    for turn, (call, _) in enumerate(calls):

        def run(chosen: Sequence[int], call: Mapping[str, Array] = call, turn: int = turn) -> Array:
            arrays = {spec.name: _element(spec, call[spec.name], turn, len(chosen)) for spec in component.inputs}
            arrays[CHOSEN] = np.asarray(chosen, np.int64)
            return outputs_of(running, arrays, [output])[output].astype(np.float64)

        exact = run([NO_LAYER])
        power = float(np.square(exact).mean())
        for start in range(0, len(layers), BATCH):
            chosen = range(start, min(start + BATCH, len(layers)))
            for k, array in zip(chosen, run(chosen), strict=True):
                errors[layers[k]] += float(np.square(array - exact[0]).mean()) / power / len(calls)
    return errors


def _element(spec: TensorSpec, array: Array, turn: int, copies: int) -> Array:
    """One element of a batch, cropped, so many times; an input without a batch as it is."""
    if not spec.shape or not isinstance(spec.shape[0], str):
        return array
    return np.repeat(_cropped(array[turn % len(array)][None]), copies, axis=0)


def _with_roundings(component: Component, noises: Mapping[str, float]) -> ir.Model:
    model = graph.load(component.graph)
    order = {weight: k for k, weight in enumerate(noises)}
    chosen = ir.Value(name=CHOSEN, type=ir.TensorType(I64), shape=ir.Shape(["chosen"]))
    model.graph.inputs.append(chosen)
    for layer in layers_of(model):
        if layer.weight not in order:
            continue
        output = layer.node.outputs[0]
        write = Writer(model, f"{layer.weight}/rounded/", after=layer.node)
        # the error of rounding to multiples of q has the mean square q * q / 12
        quantum = write.constant("quantum", max(np.sqrt(12 * noises[layer.weight]), 1e-12), F32)
        index = write.constant("index", order[layer.weight], I64)
        divided = write("Div", [output, quantum], "divided")
        coarse = write("Mul", [write("Round", [divided], "round"), quantum], "coarse")
        rank = write.constant("rank", [-1, *[1] * (len(output.shape or ()) - 1)], I64)
        switch = write("Reshape", [write("Equal", [chosen, index], "equal", dtype=BOOL), rank], "switch", dtype=BOOL)
        result = write("Where", [switch, coarse, output], "output", dtype=F32, shape=output.shape)
        own = (divided.producer(), result.producer())
        redirect(output, result, unless=lambda node, own=own: node in own)
    return model


def _cropped(array: Array) -> Array:
    """The middle of latents or pictures; anything else as it is."""
    if array.ndim != 4:
        return array
    for axis in (2, 3):
        spare = max(0, array.shape[axis] - LARGEST_EDGE)
        start = spare // 2
        array = array.take(range(start, array.shape[axis] - (spare - start)), axis)
    return np.ascontiguousarray(array)
