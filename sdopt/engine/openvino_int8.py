"""How OpenVINO adds products of int8 on this processor: exactly, or in 16 bits.

Processors with AVX2 and without VNNI add two neighbouring products in 16 bits. A larger sum becomes the largest number
of 16 bits, in silence (oneDNN, "Nuances of int8 computations"). Graphs for them have weights of 7 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import numpy as np

from sdopt import privacy
from sdopt.engine.process import library_call

with privacy.without_openvino_telemetry():
    import openvino

ov = cast(Any, openvino)  # its bindings are not typed
INT8 = "int8"
SUMS = "sums of int8 products"  # the entry of an engine's environment


def environment(options: Mapping[str, Any]) -> dict[str, str]:
    """What a graph that was built with these options depends on, besides its provider."""
    if options.get("precision") != INT8:
        return {}
    return {SUMS: "in 16 bits" if sums_saturate() else "exact"}


@cache
def sums_saturate() -> bool:
    """Whether a sum of int8 products is wrong here where it needs more than 16 bits. A small product is computed."""
    ops, terms = ov.opset13, 64
    x = ops.parameter([1, terms], np.float32)
    low, high = np.float32(0), np.float32(255)
    quantized = ops.fake_quantize(x, low, high, low, high, 256)
    short = ops.convert(ops.constant(np.full((terms, 16), 127, np.int8)), "f32")
    weight = ops.multiply(short, ops.constant(np.float32(1)))
    model = ov.Model([ops.matmul(quantized, weight, False, False)], [x])
    with library_call():
        compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1})
        (sums,) = compiled([np.full((1, terms), 255, np.float32)]).values()
    exact = 255 * 127 * terms
    return bool(np.abs(np.asarray(sums) - exact).max() > exact / 50)  # bf16 rounds it by less
