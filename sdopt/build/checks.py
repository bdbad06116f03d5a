"""Find faults of a finished plan, from its size and from what the library's inspector tells."""

from __future__ import annotations

from collections.abc import Mapping

from sdopt.build.trt_types import lost_islands
from sdopt.bundle.disk import bytes_text
from sdopt.errors import BackendError

WEIGHTY = 100 << 20  # bytes: with fewer weights, a plan's size does not tell their type
LARGER = 1.6  # a plan is smaller than this times its half weights, and about twice as large if they became float32


def size_warning(precision: str, plan: int, weights: int, profiles: int) -> str:
    """A warning if a plan of `plan` bytes is too large for its weights; else empty.

    Each profile after the first may add its own copy of the weights.
    """
    if precision == "fp32" or weights < WEIGHTY or plan <= (LARGER + profiles - 1) * weights:
        return ""
    return (
        f"the plan has {bytes_text(plan)} for {bytes_text(weights)} of {precision} weights: the library seems to have "
        "made some of them float32. It runs, slower than it could; fewer profiles, or another version of the library, "
        "may give a smaller one"
    )


def refuse_lost_islands(name: str, layers: str, types: Mapping[str, str]) -> int:
    """Refuse an engine that computes in half what is float32 in the graph.

    Returns how many float32 tensors of the graph the engine's layers show.
    Raises: BackendError naming those that the library made half.
    """
    lost, shown = lost_islands(layers, types)
    if lost:
        some = ", ".join(lost[:5])
        if len(lost) > 5:
            some += f" and {len(lost) - 5} more"
        raise BackendError(
            f"{name}: {some} must be float32, and the library made them half: its pictures would be wrong. "
            "Build it with --precision fp32, or with a TensorRT from 10 on, which keeps a graph's types"
        )
    return shown
