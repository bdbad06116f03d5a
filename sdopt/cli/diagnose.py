"""`sdopt diagnose BUNDLE --component unet`: where half precision leaves float32."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdopt.bundle.precision import precision_word
from sdopt.errors import BackendError

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--component", default="unet", help="default: unet")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", type=precision_word)
    parser.add_argument("--floor", type=float, default=40.0, metavar="DB", help="a value is lost below it; default: 40")
    parser.add_argument("--island", action="append", default=[], metavar="PATTERN", help="nodes to leave in float32")
    parser.add_argument("--attention-float32", action="store_true", help="leave attention in float32 (SD 2.1)")
    parser.add_argument("--latent", type=int, default=16, metavar="N", help="compute at N x N latents; default: 16")
    parser.add_argument("--inputs", type=Path, metavar="FILE.npz", help="what to compute with; default: random numbers")
    parser.add_argument("--json", action="store_true", help="print every layer as JSON")


def run(args: argparse.Namespace) -> int:
    try:
        from sdopt.build.diagnose import diagnose
        from sdopt.build.examples import example, sizes_of
    except ImportError as error:
        raise BackendError(f'{error}; pip install "sdopt[build,cpu]"') from error
    import numpy as np

    from sdopt.bundle.files import Bundle, embedded
    from sdopt.bundle.specs import check_inputs
    from sdopt.errors import UsageError

    bundle = Bundle.open(args.bundle or embedded())
    component = bundle.component(args.component)
    if args.latent < 1:
        raise UsageError(f"--latent {args.latent}; allowed are whole numbers from 1, as many as the UNet can halve")
    if args.inputs is None:
        arrays = example(component.inputs, sizes_of(bundle.manifest, args.latent))
    else:
        with np.load(args.inputs) as file:
            arrays = dict(file)
    check_inputs(component.name, component.inputs, arrays)
    unsafe = args.precision == "fp16" and component.name in bundle.manifest.float16_attention_unsafe
    if unsafe:
        print(f"{component.name}: attention stays float32, as in `sdopt build`: it overflows in fp16", file=sys.stderr)
    found = diagnose(
        component.graph,
        arrays,
        floor_db=args.floor,
        dtype=PRECISIONS[args.precision],
        islands=args.island,
        attention=args.attention_float32 or unsafe,
        report=lambda line: print(f"{component.name}: {line}", file=sys.stderr),
    )
    if args.json:
        layers = [_finite(asdict(layer)) for layer in found.layers]
        print(json.dumps({"outputs": _finite(found.outputs), "half": asdict(found.half), "layers": layers}))
    else:
        print("\n".join(_lines(component.name, found)))
    return 5 if found.first is not None else 0


def _lines(component: str, found: Any) -> list[str]:
    report = found.half
    outputs = ", ".join(f"{name} {db:.1f} dB" for name, db in found.outputs.items())
    lines = [f"{component} in {report.dtype}: {outputs}; {report.half_nodes} nodes in half, {report.casts} casts"]
    for name, value in report.outside.items():
        lines.append(f"weight {name}: {value:.3g} is outside the range of {report.dtype}; its readers stay float32")
    if found.first is None:
        lines.append(f"no value is below {found.floor_db:g} dB")
    else:
        lines.append(f"first below {found.floor_db:g} dB: {_shown(found.first)}")
    lines += ["", f"{'loses dB':>9}{'to dB':>8}{'largest':>10}  node"]
    for layer in found.worst():
        lines.append(f"{layer.drop:>9.1f}{layer.db:>8.1f}{layer.largest:>10.3g}  {layer.operator} {layer.output}")
    if found.first is not None:
        lines += ["", f"to leave it in float32: --island {found.first.island!r}"]
    return lines


def _shown(layer: Any) -> str:
    lost = "is not finite" if layer.db == float("-inf") else f"has {layer.db:.1f} dB"
    return f"{layer.operator} {layer.output} {lost}, after {layer.before_db:.1f} dB; largest value {layer.largest:.3g}"


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a number that is not finite is null."""
    return {name: None if value in (float("inf"), float("-inf")) else value for name, value in values.items()}
