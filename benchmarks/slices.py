"""Slices of SD3's and Flux's transformers at full width, with random weights: parity, half precision, engines, memory.

    python benchmarks/slices.py                   every slice; each in a process of its own
    python benchmarks/slices.py --slices sd3.5-medium -o slices.json
    python benchmarks/slices.py --slices sd3.5-medium --layers 2 4 8 -o slope.json     what a block adds to an export

A slice has the published width and a few blocks. It is exported as any transformer is, with the parity gate. `half_db`
is how near the graph is to itself in float32 when it rounds as fp16 and bf16 do (`sdopt.build.simulate`), at 512x512;
`fp8_db` the same with every layer in fp8, in the power of the output over that of its error.
With TensorRT-RTX installed, its engines are built for one picture of that size. Random weights are smaller than trained
ones: what overflows in a trained model need not overflow here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdopt.bench.machine import machine
from sdopt.bundle.disk import write_whole

RESULTS = Path(__file__).parent / "results/slices.json"
SIZES = {"batch": 1, "latent_height": 64, "latent_width": 64, "tokens": 77 + 256}
SD3: dict[str, Any] = {
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16, "out_channels": 16,
}  # fmt: skip
# name -> (family, configuration of the slice, blocks of the whole model)
SLICES: dict[str, tuple[str, dict[str, Any], int]] = {
    "sd3-medium": ("sd3", {
        **SD3, "num_attention_heads": 24, "caption_projection_dim": 1536, "num_layers": 2, "pos_embed_max_size": 192,
    }, 24),
    "sd3.5-medium": ("sd3", {
        **SD3, "num_attention_heads": 24, "caption_projection_dim": 1536, "num_layers": 2, "pos_embed_max_size": 384,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }, 24),
    "sd3.5-large": ("sd3", {
        **SD3, "num_attention_heads": 38, "caption_projection_dim": 2432, "num_layers": 2, "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    }, 38),
    "flux-dev": ("flux", {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}, 57),
}  # fmt: skip


def part_of(name: str, config: dict[str, Any]) -> Any:
    """The part of a slice with random weights."""
    import torch
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    from sdopt.export.blocks import transformer
    from sdopt.export.families import flux, sd3

    family = SLICES[name][0]
    torch.manual_seed(0)
    if family == "sd3":
        model: Any = SD3Transformer2DModel(**config)
        wrapper: Any = sd3.Transformer(model)
        shape = transformer.Shape(16, config["joint_attention_dim"], config["pooled_projection_dim"], patch=2)
    else:
        model = FluxTransformer2DModel(**config)
        wrapper = flux.Transformer(model, 16)
        shape = transformer.Shape(16, 4096, 768, patch=2, guidance=True)
    return transformer.part(wrapper.eval().requires_grad_(False), shape)


def measured(name: str, builds: bool, layers: int | None = None) -> dict[str, Any]:
    """What is found when this process exports and builds a slice."""
    from sdopt.export import component

    _, config, blocks = SLICES[name]
    if layers is not None:
        config = {**config, "num_layers": layers}
    part = part_of(name, config)
    count = sum(weight.numel() for weight in part.module.parameters())
    with tempfile.TemporaryDirectory(prefix="slice-") as own:
        folder, started = Path(own), time.perf_counter()
        entries = component.write_part(part, folder, 23, 80.0, lambda line: None, lambda phase: None)
        found: dict[str, Any] = {
            "slice": name,
            "blocks": f"{config['num_layers'] + config.get('num_single_layers', 0)} of {blocks}",
            "parameters": count,
            "export_seconds": round(time.perf_counter() - started, 1),
            "export_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "parity_db": min(result.psnr_db for result in entries["transformer"].parity),
        }
        del part
        scalings: dict[str, Any] = {}
        if layers is None:
            found["half_db"] = half_db(folder / "transformer.onnx", folder)
            scalings, found["fp8_db"] = in_fp8(folder / "transformer.onnx", folder)
        if builds:
            found["engines"] = {precision: engine(folder, precision) for precision in ("fp16", "bf16")}
            found["engines"]["fp8"] = engine(folder, "fp8", scalings)
    return {**found, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def half_db(path: Path, folder: Path) -> dict[str, float]:
    """How near the graph is to itself in float32 when it rounds as half precision does, in dB."""
    from sdopt import graph
    from sdopt.build.examples import example
    from sdopt.build.half import half
    from sdopt.build.simulate import outputs_of, session, simulate_half
    from sdopt.metrics import psnr

    arrays = example(graph.specs(graph.load(path))[0], SIZES)
    (exact,) = outputs_of(session(path, optimize=True), arrays).values()
    found: dict[str, float] = {}
    for word, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        model = graph.load(path)
        half(model, dtype=dtype)
        rounded = folder / f"{word}.onnx"
        graph.save(simulate_half(model), rounded)
        (output,) = outputs_of(session(rounded, optimize=False), arrays).values()
        found[word] = round(psnr(exact, output), 1)
        for file in folder.glob(f"{word}.onnx*"):
            file.unlink()
    return found


def in_fp8(path: Path, folder: Path) -> tuple[dict[str, Any], float]:
    """(the scalings of all layers in fp8, from one call; how near the graph then is to float32, in dB)."""
    from sdopt import graph
    from sdopt.build.calibrate import Calibration
    from sdopt.build.choices import choices_of
    from sdopt.build.examples import example
    from sdopt.build.int8 import FP8_PRODUCTS
    from sdopt.build.observe import Observer
    from sdopt.bundle.files import Component

    component = Component("transformer", path, *graph.specs(graph.load(path)))
    arrays = example(component.inputs, SIZES)
    with Observer(component, folder, calls=1) as observer:
        (exact,) = observer(**arrays).values()
        choices = choices_of(component, observer.seen, FP8_PRODUCTS)
    calibration = Calibration(component, choices, ((arrays, exact),))
    scalings = calibration.scalings()
    return scalings, round(calibration.fidelity(scalings), 1)


def engine(folder: Path, precision: str, scalings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A plan of TensorRT-RTX for one picture, built without a GPU: seconds and bytes. `scalings`: of layers in fp8."""
    from sdopt import graph
    from sdopt.build.half import half
    from sdopt.build.int8 import int8
    from sdopt.build.lower import lower_operators
    from sdopt.build.options import BuildOptions
    from sdopt.build.trt_build import Builder
    from sdopt.bundle.specs import Profile
    from sdopt.engine.trt_api import TensorRT

    model = graph.load(folder / "transformer.onnx")
    inputs = graph.specs(model)[0]
    half(model, dtype="bfloat16" if precision == "bf16" else "float16")
    if scalings is not None:
        int8(model, scalings)
    builder = Builder(
        TensorRT("tensorrt-rtx"),
        asdict(BuildOptions(precision=precision)),
        None,
        report=lambda line: None,
        name="slice",
    )
    lower_operators(model, builder.unsupported(sorted({node.op_type for node in model.graph if not node.domain})))
    path, plan = folder / "engine.onnx", folder / "engine.plan"
    graph.save(model, path)
    started = time.perf_counter()
    builder.build(path, plan, inputs, [Profile({name: (length,) * 3 for name, length in SIZES.items()})])
    found = {"seconds": round(time.perf_counter() - started, 1), "plan_bytes": plan.stat().st_size}
    for file in (plan, *folder.glob("engine.onnx*")):
        file.unlink()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the slices; 0 if all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", nargs="+", default=list(SLICES), choices=SLICES)
    parser.add_argument("--no-engines", action="store_true", help="build none with TensorRT-RTX")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="export slices of so many blocks of both streams, no more"
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measured(args.one, not args.no_engines, args.layers[0] if args.layers else None)))
        return 0
    slices: list[dict[str, Any]] = []
    for name, layers in itertools.product(args.slices, args.layers or [None]):
        own = [] if layers is None else ["--layers", str(layers)]
        skip = ["--no-engines"] if args.no_engines or layers is not None else []
        command = [sys.executable, __file__, "--one", name, *own, *skip]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode
        slices.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(slices[-1]))
        record = {"machine": machine(), "units": "s, bytes, dB", "slices": slices}
        write_whole(args.output, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
