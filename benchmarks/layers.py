"""Where the time of one UNet call goes on this processor: by layer, beside what the arithmetic alone would take.

    python benchmarks/layers.py BUNDLE --precision fp32 --precision bf16        writes benchmarks/results/layers.json
    sdopt build BUNDLE --backend openvino --precision int8
    python benchmarks/layers.py BUNDLE --precision int8 --size 512x512

OpenVINO counts the time of each layer that it runs. The multiply-adds of a layer are counted from the shapes of the
graph. The speed of the arithmetic is measured here too, in each precision: that of a large matrix product or
convolution. The limit of a layer is its multiply-adds divided by that speed of the precision it runs in. "Above" is its
time less this. A group is one kind of layer at one size: 64x64 latents are 4096 tokens of an attention.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino as ov

import sdopt
from sdopt.bench.machine import machine, versions
from sdopt.bundle.disk import write_whole
from sdopt.engine import EngineOptions
from sdopt.engine.built import built_graph

RESULTS = Path(__file__).parent / "results/layers.json"
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # what OpenVINO is told; int8 stands in the graph
PEAK = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "f32": "fp32", "f16": "fp32", "i8": "int8", "u8": "int8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="default: bf16")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random-weights", action="store_true", help="say so in the record")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    peaks = {name: peak(name) for name in PRECISIONS}
    print({name: f"{speed / 1e9:.0f} G multiply-adds/s" for name, speed in peaks.items()}, flush=True)
    profiles = {name: profile(args, name, peaks) for name in args.precision or ["bf16"]}
    record = {
        "machine": machine(), "versions": versions(), "size": args.size,
        "random_weights": args.random_weights, "multiply_adds_per_s": peaks, "profiles": profiles,
    }  # fmt: skip
    write_whole(args.output, json.dumps(record, indent=1) + "\n")
    for name, found in profiles.items():
        print(table(name, found))


def profile(args: argparse.Namespace, precision: str, peaks: dict[str, float]) -> dict[str, Any]:
    """Times, limits and multiply-adds of one call with both halves of guidance, in all and by group of layers."""
    bundle = sdopt.Bundle.open(args.bundle)
    component = bundle.component("unet")
    if precision == "int8":
        found = built_graph(bundle, "unet", EngineOptions("openvino", precision="int8"), "CPU")
        if found is None:
            command = f"sdopt build {args.bundle} --backend openvino --precision int8"
            raise SystemExit(f"{args.bundle} has no int8 engine: {command}")
        component = found[1]
    width, height = (int(side) // bundle.factor for side in args.size.split("x"))
    core = ov.Core()
    model = core.read_model(component.graph)
    fixed = {}
    for spec in component.inputs:
        sizes = {"latent_height": height, "latent_width": width, "tokens": 77}
        fixed[spec.name] = [d if isinstance(d, int) else sizes.get(d, 2 if "2" in d else 1) for d in spec.shape]
    fixed["encoder_hidden_states"][0] = 2
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[precision]}
    every_size = core.compile_model(model, "CPU", options).create_infer_request()
    model.reshape(fixed)
    work = dict(multiply_adds(model))
    compiled = core.compile_model(model, "CPU", {**options, "PERF_COUNT": True})
    rng = np.random.default_rng(0)
    given = {
        name: np.full(shape, 500, np.float32) if name == "timestep" else rng.standard_normal(shape, np.float32)
        for name, shape in fixed.items()
    }
    request = compiled.create_infer_request()
    layers = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ordered_ops()}
    seconds: list[float] = []
    dynamic: list[float] = []
    times: dict[str, list[float]] = {}
    for _ in range(args.rounds + 1):
        started = time.perf_counter()
        every_size.infer(given)
        dynamic.append(time.perf_counter() - started)
        started = time.perf_counter()
        request.infer(given)
        seconds.append(time.perf_counter() - started)
        for layer in request.profiling_info:
            times.setdefault(layer.node_name, []).append(layer.real_time.total_seconds())
    rows: dict[str, dict[str, Any]] = {}
    for name, own in times.items():
        if name not in layers or median(own[1:]) == 0:
            continue
        keys = ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
        info = {key: layers[name].get_rt_info()[key].astype(str) for key in keys}
        origins = info["originalLayersNames"].split(",")
        shape = list(layers[name].output(0).get_shape()) if layers[name].get_output_size() else []
        macs = sum(work.get(one, 0) for one in origins)
        if info["layerType"].startswith("FullyConnected"):  # an int8 one has no name of the graph
            macs = prod(shape) * layers[name].input(0).get_shape()[-1]
        group = f"{_group(info['layerType'], shape, macs)} in {info['runtimePrecision']}"
        row = rows.setdefault(
            group, {"layers": 0, "seconds": 0.0, "limit": 0.0, "multiply_adds": 0, "by": info["primitiveType"]}
        )
        row["layers"] += 1
        row["seconds"] += median(own[1:])
        row["multiply_adds"] += macs
        row["limit"] += macs / peaks[PEAK[info["runtimePrecision"].lower()]]
    groups = dict(sorted(rows.items(), key=lambda item: item[1]["limit"] - item[1]["seconds"]))
    return {
        "seconds": median(seconds[1:]),
        "seconds_for_every_size": median(dynamic[1:]),
        "seconds_of_layers": sum(row["seconds"] for row in groups.values()),
        "limit": sum(row["limit"] for row in groups.values()),
        "multiply_adds": sum(work.values()),
        "groups": groups,
    }


def _group(kind: str, shape: list[int], macs: int) -> str:
    """Where a layer is counted: its kind and its tokens. A fused layer that multiplies matrices is an attention."""
    if kind == "Subgraph" and macs and len(shape) == 4:
        return f"attention of {max(shape[1:3])} tokens to {macs // (2 * prod(shape))}"
    kind = "element-wise" if kind == "Subgraph" else kind
    if len(shape) == 4 and shape[2] == shape[3]:
        return f"{kind} at {shape[2]}x{shape[3]}"
    return f"{kind} at {shape[1]} tokens" if len(shape) == 3 else kind


def multiply_adds(model: Any) -> Iterator[tuple[str, int]]:
    """Each convolution, matrix product and attention of a model with fixed shapes, and its multiply-adds."""
    for op in model.get_ordered_ops():
        kind, name = op.get_type_name(), op.get_friendly_name()
        if kind in ("Convolution", "GroupConvolution"):
            kernel = list(op.input(1).get_shape())
            each = prod(kernel[1:]) if kind == "Convolution" else prod(kernel[2:])
            yield name, prod(op.output(0).get_shape()) * each
        elif kind == "MatMul":
            inner = list(op.input(0).get_shape())[-2 if op.get_attributes()["transpose_a"] else -1]
            yield name, prod(op.output(0).get_shape()) * inner
        elif kind == "ScaledDotProductAttention":
            query, key, value = (list(op.input(k).get_shape()) for k in range(3))
            yield name, prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def peak(precision: str) -> float:
    """Multiply-adds in a second of the best of a few calls of a product of two matrices, or of a convolution."""
    opset: Any = ov.opset13
    rng, best = np.random.default_rng(0), 0.0
    for kind, shape, kernel in (
        ("MatMul", (2048, 2048), (2048, 2048)),
        ("Convolution", (2, 640, 32, 32), (640, 640, 3, 3)),
    ):
        given = opset.parameter(list(shape), np.float32)
        if precision == "int8":
            low, high = (opset.constant(np.float32(end)) for end in (0, 1))
            rows: Any = opset.fake_quantize(given, low, high, low, high, 256)
            whole = opset.convert(opset.constant(rng.integers(-127, 128, kernel).astype(np.int8)), np.float32)
            weight = opset.multiply(whole, opset.constant(np.float32(1 / 127)))
        else:
            rows, weight = given, opset.constant(rng.standard_normal(kernel, np.float32))
        if kind == "MatMul":
            result = opset.matmul(rows, weight, False, True)
        else:
            result = opset.convolution(rows, weight, [1, 1], [1, 1], [1, 1], [1, 1])
        model = ov.Model([result], [given], kind)
        work = sum(macs for _, macs in multiply_adds(model))
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERF_COUNT": True}
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        for _ in range(10):
            request.infer([rng.random(shape, np.float32)])
            best = max(best, work / max(one.real_time.total_seconds() for one in request.profiling_info))
    return best


def table(precision: str, found: dict[str, Any], most: int = 12) -> str:
    """The groups with the most time above their limit, as Markdown."""
    lines = [
        f"{precision}: {found['seconds'] * 1000:.0f} ms a call ({found['seconds_for_every_size'] * 1000:.0f} ms by the "
        f"graph for every size), layers {found['seconds_of_layers'] * 1000:.0f}, "
        f"arithmetic {found['limit'] * 1000:.0f} ms",
        "| layers | number | ms | arithmetic | above |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in list(found["groups"].items())[:most]:
        took, limit = row["seconds"] * 1000, row["limit"] * 1000
        lines.append(f"| {name} ({row['by']}) | {row['layers']} | {took:.0f} | {limit:.0f} | {took - limit:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
