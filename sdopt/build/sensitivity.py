"""How much the output of a component suffers from an error in one of its layers, for every layer.

The graph computes each layer's output, and beside it the same output rounded so coarsely that the rounding has the
power of the layer's error in int8. An input of the graph chooses the layers whose output is the rounded one. So one
session answers for all layers, with one call for each. Errors of layers are nearly independent, so that the error of
several is their sum.
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
from sdopt.bundle.specs import Array, Float32
from sdopt.graph import BOOL, F32, I64, Writer, redirect

LARGEST_EDGE = 16  # latents; larger ones are cropped: the question is which layers matter, not how much in all
CHOSEN = "rounded_layers"  # the input that chooses


def output_errors(
    component: Component, noises: Mapping[str, float], calls: Sequence[tuple[dict[str, Array], Float32]], folder: Path
) -> dict[str, float]:
    """For each layer, the power of the output's error over the output's, if this layer alone has its noise.

    `noises`: the mean square of each layer's error, by the name of its weight. `calls`: (inputs, anything).
    """
    path = folder / f"{component.name}-rounded.onnx"
    graph.save(_with_roundings(component, noises), path)
    running, output = session(path, optimize=True), component.outputs[0].name

    def run(arrays: Mapping[str, Array], chosen: Array) -> Array:
        return outputs_of(running, {**arrays, CHOSEN: chosen}, [output])[output].astype(np.float64)

    errors = dict.fromkeys(noises, 0.0)
    for call, _ in calls:
        arrays = {name: _cropped(array) for name, array in call.items()}
        exact = run(arrays, np.zeros(len(noises), bool))
        power = float(np.square(exact).mean())
        for k, weight in enumerate(noises):
            chosen = np.arange(len(noises)) == k
            errors[weight] += float(np.square(run(arrays, chosen) - exact).mean()) / power / len(calls)
    return errors


def _with_roundings(component: Component, noises: Mapping[str, float]) -> ir.Model:
    model = graph.load(component.graph)
    order = {weight: k for k, weight in enumerate(noises)}
    chosen = ir.Value(name=CHOSEN, type=ir.TensorType(BOOL), shape=ir.Shape([len(noises)]))
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
        switch = write("Gather", [chosen, index], "switch", dtype=BOOL, shape=())
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
