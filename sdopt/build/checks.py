"""What is wrong with a finished plan, from what its library tells of it."""

from __future__ import annotations

from collections.abc import Mapping

from sdopt.build.trt_types import lost_islands
from sdopt.engine.cuda import bytes_text
from sdopt.errors import BackendError

WEIGHTY = 100 << 20  # bytes of weights from which a plan's size tells their type
LARGER = 1.6  # a plan of half weights with all that comes with them is smaller than this; of float32, twice as large


def size_warning(precision: str, plan: int, weights: int, profiles: int) -> str:
    """What is odd about a plan of so many bytes; empty if nothing. Each further profile may bring its own copies."""
    if precision == "fp32" or weights < WEIGHTY or plan <= (LARGER + profiles - 1) * weights:
        return ""
    return (
        f"the plan has {bytes_text(plan)} for {bytes_text(weights)} of {precision} weights: the library seems to have "
        "made some of them float32. It runs, slower than it could; fewer profiles, or another version of the library, "
        "may give a smaller one"
    )


def refuse_lost_islands(name: str, layers: str, types: Mapping[str, str]) -> int:
    """How many float32 tensors of the graph the finished engine shows, all of them float32.

    Raises: BackendError naming those that it made half.
    """
    lost, shown = lost_islands(layers, types)
    if lost:
        some = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise BackendError(
            f"{name}: {some} must be float32, and the library made them half: its pictures would be wrong. "
            "Build it with --precision fp32, or with a TensorRT from 10 on, which keeps a graph's types"
        )
    return shown
