"""Make the graph of one engine: with the fused step, in its precision, and in operators that its library knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sdopt import graph
from sdopt.build.features import leave_features_out, take_features
from sdopt.build.fuse_step import fuse_step
from sdopt.build.half import half
from sdopt.build.halves import join_halves
from sdopt.build.int8 import Scaling, int8
from sdopt.build.int8_weights import round_weights
from sdopt.build.join_control import join_control
from sdopt.build.lower import OPSET, lower, lower_operators
from sdopt.build.options import INT8_WEIGHTS, PRECISIONS
from sdopt.build.recipe import EngineSpec
from sdopt.build.refit import put_into, widen_weights
from sdopt.build.shallow import keep_deep, take_deep
from sdopt.build.trt_build import Builder
from sdopt.bundle.adapter import CONTROLNET, T2I_ADAPTER, located, open_adapter
from sdopt.bundle.files import Bundle
from sdopt.bundle.joined import DEEP, Steering
from sdopt.bundle.specs import Profile
from sdopt.bundle.weights import Overlay, Weights
from sdopt.graph.ort_ops import ort_ops


def derive(
    bundle: Bundle,
    part: EngineSpec,
    options: Mapping[str, Any],
    builder: Builder | None = None,
    device: str = "",
    backend: str = "ort",
    overlay: Overlay | None = None,
    scalings: Mapping[str, Scaling] | None = None,
) -> tuple[ir.Model, dict[str, Any]]:
    """(the graph, notes for the engine's record). Without a builder, the graph is for `backend` on `device`.

    `overlay`: other numbers for some of its weights. `scalings`: of the layers that become int8.
    """
    home, name = located(bundle, part.graph)
    component = home.component(name)
    model = graph.load(component.graph)
    if overlay is not None:
        put_into(model, overlay.merged(part.name, Weights.of(component)))
    if part.steering:
        _steer(model, bundle, part.steering)
    notes: dict[str, Any] = {}
    if part.cache:
        (keep_deep if part.cache == DEEP else take_deep)(model, part.depth)
    if part.fuse:
        guided = part.fuse == "guided"
        fuse_step(model, guided=guided, rescale=guided, latent_channels=bundle.manifest.latents.channels)
        join_halves(model, 2 if guided else 1)
    on_gpu = builder is not None or device == "cuda"
    if options["precision"] == INT8_WEIGHTS:
        # before `half`, so that numbers are rounded once
        notes["rounded_layers"] = round_weights(model, for_tensorrt=builder is not None)
    compute = ("fp16" if on_gpu else "fp32") if scalings is not None else options.get("compute", options["precision"])
    dtype = PRECISIONS[compute]
    if dtype:
        report = half(model, dtype=dtype, islands=part.islands, attention=options["attention"])
        notes |= {"half_nodes": report.half_nodes, "islands": len(report.islands), "outside": report.outside}
    elif options["refit"]:
        widen_weights(model)
    if scalings is not None:
        notes["quantized_layers"] = int8(model, scalings)
    if builder is not None:
        notes |= _for_parser(model, builder)
    elif backend == "ort" and dtype in (("", "float16") if device == "cuda" else ("",)):  # what its kernels take
        ort_ops(model)
    return model, notes


def _steer(model: ir.Model, bundle: Bundle, steering: Steering) -> None:
    """Put ControlNets inside, and leave of the other inputs for adapters those that this engine takes."""
    if T2I_ADAPTER in steering.kinds:
        take_features(model)
    else:
        leave_features_out(model)
    nets = {name: open_adapter(bundle, name).component(CONTROLNET) for name in steering.nets}
    join_control(model, {name: graph.load(net.graph) for name, net in nets.items()})


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
