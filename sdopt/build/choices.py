"""How each layer of a component becomes int8: its scale, and its factors where they help.

Scales come from what the layers multiply in a denoising run; see `sdopt.build.observe`. Layers that read the same
tensor have one scaling. Factors are taken where they make the error of the layers' own outputs smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sdopt import graph
from sdopt.build.int8 import (
    LARGEST,
    Arithmetic,
    Layer,
    Scaling,
    layers_of,
    norm_before,
    rounded,
    smoothed,
    weight_scale,
)
from sdopt.build.observe import Seen
from sdopt.bundle.files import Component
from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass

MOSTLY_POSITIVE = 0.5  # a tensor whose lowest value is above this part of the highest one, below zero, becomes uint8
EXPONENTS = (0.5, 0.7)  # of the input's largest values in the factors (Xiao et al. 2022, eq. 4: alpha)
WORTH_NOTHING, WORTH_A_PRODUCT = 0.5, 3.0  # dB that factors must gain, inside of a norm and as a product of their own


@dataclass(frozen=True, eq=False)
class Choice:
    """How one layer becomes int8, and what that does.

    `noise`, `error`: the mean square of the error in its own output, and the same over the output's. `harm`: the power
    of the error in the component's output over that of the output. `products`: multiply-adds in one call.
    """

    scaling: Scaling
    noise: float
    error: float
    products: int = 0
    harm: float = 0.0


def choices_of(component: Component, seen: Mapping[str, Seen], arithmetic: Arithmetic) -> dict[str, Choice]:
    groups: dict[Any, list[Layer]] = {}
    for layer in layers_of(graph.load(component.graph)):
        groups.setdefault((layer.input, layer.node.op_type, layer.shape[2:]), []).append(layer)
    choices: dict[str, Choice] = {}
    for layers in groups.values():
        choices |= _of_group(layers, seen, arithmetic)
    return choices


def _of_group(layers: Sequence[Layer], seen: Mapping[str, Seen], arithmetic: Arithmetic) -> dict[str, Choice]:
    """The choices of layers that read the same tensor, which have one scaling."""
    edges = seen[layers[0].weight]
    largest = np.maximum(edges.highest, -edges.lowest)
    plain = _with(layers, seen, None, arithmetic)
    best, gain = plain, 0.0
    for exponent in EXPONENTS:
        other = _with(layers, seen, _factors(layers, largest, exponent), arithmetic)
        gained = decibels(_total(other)) - decibels(_total(plain))
        if gained > gain:
            best, gain = other, gained
    free = norm_before(layers[0].input, [layer.node for layer in layers]) is not None
    if gain < (WORTH_NOTHING if free else WORTH_A_PRODUCT):
        best = plain
    return {name: replace(choice, products=seen[name].products) for name, choice in best.items()}


def _total(choices: Mapping[str, Choice]) -> float:
    return sum(choice.error for choice in choices.values())


def _factors(layers: Sequence[Layer], largest: Float32, exponent: float) -> Float32:
    """Factors of the input's channels (Xiao et al. 2022, eq. 4), with 1 as their geometric mean."""
    axes = (0, 2, 3) if layers[0].is_conv else (1,)
    weights: Float32 = np.max([np.abs(layer.numbers).max(axes) for layer in layers], axis=0)
    least = np.float32(1e-5)
    factors: Array = np.maximum(largest, least) ** exponent / np.maximum(weights, least) ** (1 - exponent)
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)


def _with(
    layers: Sequence[Layer], seen: Mapping[str, Seen], factors: Float32 | None, arithmetic: Arithmetic
) -> dict[str, Choice]:
    """The choices with these factors. The scale covers all that was seen: errors of large values do most harm.

    The mean error comes from the rows, and the errors from those of the held-out prompt too, which may be larger.
    """
    edges = seen[layers[0].weight]
    divisor = np.float32(1) if factors is None else factors
    high, low = float((edges.highest / divisor).max()), float((edges.lowest / divisor).min())
    kind, largest = arithmetic.kind, arithmetic.largest_weight
    if arithmetic.unsigned and layers[0].is_conv and -low < MOSTLY_POSITIVE * high:
        scale = max(high - low, 1e-6) / 255
        zero = round(-low / scale)
    else:
        scale, zero = max(high, -low, 1e-6) / LARGEST[kind], 0
    choices: dict[str, Choice] = {}
    for layer in layers:
        weight = layer.numbers if factors is None else smoothed(layer.numbers, factors, layer.is_conv)
        short = rounded(weight, weight_scale(weight, layer.is_conv, largest), kind=kind)
        own = seen[layer.weight]
        rows = np.concatenate([*own.rows, *own.judging])
        if factors is not None:
            rows = rows / np.repeat(factors, rows.shape[1] // factors.size)
        exact = rows @ _matrix(weight)
        error = rounded(rows, scale, zero, kind) @ _matrix(short) - exact
        shift: Float32 | None = error[: sum(map(len, own.rows))].mean(0) if layer.bias is not None else None
        noise = float(np.square(error if shift is None else error - shift).mean())
        power = float(np.square(exact).mean())
        scaling = Scaling(scale, factors, zero, shift, kind, largest)
        choices[layer.weight] = Choice(scaling, noise, noise / max(power, 1e-30))
    return choices


def _matrix(weight: Float32) -> Float32:
    """A weight as [numbers of an output, outputs]."""
    if weight.ndim == 2:
        return weight
    matrix: Any = weight.reshape(len(weight), -1)  # NumPy's types lose its shape here
    return matrix.T


def decibels(ratio: float) -> float:
    """A ratio of powers in dB, larger for a smaller error."""
    return -10 * math.log10(max(ratio, 1e-30))
