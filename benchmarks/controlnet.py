"""What a ControlNet costs: one call of it beside one of the UNet, and what the UNet's further inputs cost.

    python benchmarks/controlnet.py build-out/models/sd15/bundle       writes benchmarks/results/controlnet.json
    python benchmarks/controlnet.py engines/emoji/bundle -o build-out/control.json

Both halves of guidance are in each call, at the bundle's own size. The three engines are called in turns. Each figure
is the median of `--rounds`, and each ratio the median of the ratios of one round. Parity says how near the controlled
UNet with residuals of zero is to the plain one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import sdopt
from sdopt.bench.machine import machine, versions
from sdopt.bundle.adapter import CONTROLLED, CONTROLNET, adapter_component, adapter_names, open_adapter
from sdopt.bundle.disk import write_whole
from sdopt.denoise.control import nothing
from sdopt.metrics import psnr

RESULTS = Path(__file__).parent / "results/controlnet.json"


def inputs_of(bundle: sdopt.Bundle, component: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Random inputs for one picture with both halves of guidance."""
    defaults, factor = bundle.manifest.defaults, bundle.factor
    sizes = {
        "images": 1, "batch": 2, "tokens": max(entry.max_length for entry in bundle.manifest.tokenizers.values()),
        "height": defaults.height, "width": defaults.width,
        "latent_height": defaults.height // factor, "latent_width": defaults.width // factor,
    }  # fmt: skip
    shapes = {spec.name: spec.sized({**dict.fromkeys(map(str, spec.shape), 1), **sizes}) for spec in component.inputs}
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {**given, "timestep": np.full(shapes["timestep"], 500, np.float32)}


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--control", help="the ControlNet; without it the bundle's first one")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with sdopt.load(args.bundle, args.backend) as pipe:
        bundle = pipe.bundle
        name = args.control or adapter_names(bundle)[0]
        plain, controlled = (pipe.engine(component) for component in ("unet", CONTROLLED))
        net = pipe.engine(adapter_component(name, CONTROLNET))
        adapter = open_adapter(bundle, name)
        of_unet = inputs_of(bundle, bundle.component("unet"), rng)
        further = [spec for spec in controlled.inputs if spec.name not in of_unet]
        zeros = {
            **nothing([spec for spec in further if spec.shape[0] == "batch"], 2),
            **nothing([spec for spec in further if spec.shape[0] == "images"], 1),
        }
        of_net = {**inputs_of(bundle, adapter.component(CONTROLNET), rng), **{
            name: array for name, array in of_unet.items() if name in {spec.name for spec in net.inputs}
        }}  # fmt: skip
        calls: dict[str, Callable[[], dict[str, Any]]] = {
            "unet": lambda: plain(**of_unet),
            "unet_controlled_with_zeros": lambda: controlled(**of_unet, **zeros),
            "controlnet": lambda: net(**of_net),
        }
        parity = psnr(calls["unet"]()["noise_pred"], calls["unet_controlled_with_zeros"]()["noise_pred"])
        calls["controlnet"]()
        rounds = [{what: seconds(call) for what, call in calls.items()} for _ in range(args.rounds)]
        result = {
            "bundle": bundle.manifest.name or bundle.path.name,
            "size": f"{bundle.manifest.defaults.width}x{bundle.manifest.defaults.height}",
            "random_weights": bundle.manifest.random_weights is not None,
            "backend": f"{pipe.backend} in {pipe.precision}",
            "seconds": {what: round(median(one[what] for one in rounds), 4) for what in calls},
            "of_a_unet_call": {
                what: round(median(one[what] / one["unet"] for one in rounds), 3) for what in list(calls)[1:]
            },
            "parity_db_with_zeros": round(parity, 1) if np.isfinite(parity) else "equal",
            "rounds": args.rounds,
            "machine": machine(),
            "versions": versions(),
        }
    write_whole(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("seconds", "of_a_unet_call", "parity_db_with_zeros")}, indent=1))


if __name__ == "__main__":
    main()
