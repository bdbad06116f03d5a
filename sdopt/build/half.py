"""A float32-typed graph as a float16 or bfloat16 one, with float32 islands."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class HalfReport:
    """What `half` did: nodes in half and in float32 with the reason, and weights that do not fit into float16."""

    dtype: str
    half_nodes: int
    islands: dict[str, str]  # name of a float32 node -> why it is one
    outside: dict[str, float]  # name of a weight outside the range -> its largest absolute value; they stay float32
    weight_bytes: int


def half(
    model: ir.Model,
    *,
    dtype: str = "float16",
    islands: Sequence[str] = (),
    attention: bool = False,
    half_edges: Collection[str] = (),
) -> HalfReport:
    """`model`, changed in place to compute in `dtype` ("float16" or "bfloat16").

    Float32 in any case: names under `step/`, the timestep embedding, statistics of norms that do not compute them in float32
    themselves; then `attention=True` (SD 2.1), and nodes whose name or op type matches a pattern of `islands` (as in a
    shell: "*up_blocks.3*", "Softmax"). Inputs and outputs stay float32 with a Cast inside, but for those whose names
    match `half_edges`.
    Raises: UsageError for a pattern that matches nothing, or an unknown dtype.
    """
    raise NotImplementedError
