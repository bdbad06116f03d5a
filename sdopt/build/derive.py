"""Make the graph of one engine: with the fused step, in its precision, and in operators that its library knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sdopt import graph
from sdopt.build.fuse_step import fuse_step
from sdopt.build.half import half
from sdopt.build.halves import join_halves
from sdopt.build.lower import OPSET, lower, lower_operators
from sdopt.build.options import PRECISIONS
from sdopt.build.recipe import EngineSpec
from sdopt.build.trt_build import Builder
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Profile
from sdopt.graph.ort_ops import ort_ops


def derive(
    bundle: Bundle, part: EngineSpec, options: Mapping[str, Any], builder: Builder | None = None, device: str = ""
) -> tuple[ir.Model, dict[str, Any]]:
    """(the graph, notes for the engine's record). Without a builder, the graph is for ONNX Runtime on `device`."""
    model = graph.load(bundle.component(part.graph).graph)
    notes: dict[str, Any] = {}
    if part.fuse:
        guided = part.fuse == "guided"
        fuse_step(model, guided=guided, rescale=guided, latent_channels=bundle.manifest.latents.channels)
        join_halves(model, 2 if guided else 1)
    dtype = PRECISIONS[options["precision"]]
    if dtype:
        report = half(model, dtype=dtype, islands=part.islands, attention=options["attention"])
        notes |= {"half_nodes": report.half_nodes, "islands": len(report.islands), "outside": report.outside}
    if builder is not None:
        notes |= _for_parser(model, builder)
    elif not dtype or (device == "cuda" and options["precision"] == "fp16"):  # on a CPU, these kernels are float32 only
        ort_ops(model)
    return model, notes


def _for_parser(model: ir.Model, builder: Builder) -> dict[str, Any]:
    """Replace the operators that the parser does not know; a note of which they were."""
    if not builder.strongly_typed:
        lower(model)
        return {"lowered": [f"all operators to opset {OPSET}"]}
    unknown = builder.unsupported(sorted({node.op_type for node in model.graph if not node.domain}))
    if not unknown:
        return {}
    lower_operators(model, unknown)
    return {"lowered": unknown}


def constant_lengths(profiles: Sequence[Profile]) -> dict[str, int]:
    """The dimensions that have the same single length in all profiles, with that length."""
    constant: dict[str, int] = {}
    for name in profiles[0].ranges:
        lengths = {length for profile in profiles for length in profile.ranges[name]}
        if len(lengths) == 1:
            constant[name] = lengths.pop()
    return constant
