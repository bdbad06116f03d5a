"""What a LoRA costs: to read its file, to merge it, and to open the UNet with other weights, beside one call of it.

    python benchmarks/lora.py build-out/models/sd15/bundle                      writes benchmarks/results/lora.json
    python benchmarks/lora.py engines/emoji/bundle -o build-out/lora-emoji.json

The file is random: rank 16 on every linear and 1x1 convolution of the UNet's attentions, as kohya's sd-scripts trains
them. Times do not depend on its numbers. Each figure is the least of `--rounds`, all in one process, as seconds of the
clock and as seconds of the processor (`_cpu_s`, of all threads), which other programs disturb less. The first opening
fills the cache of optimised graphs and is not counted. Memory is the peak of a process of its own that opens the UNet,
changes its weights once, and calls it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import sdopt
from sdopt.adapters.lora.loaded import Loras
from sdopt.bench.machine import machine, versions
from sdopt.bench.protocol import peak_rss_bytes
from sdopt.bundle.disk import write_whole
from sdopt.bundle.weights import Weights
from sdopt.engine.cores import usable_cores
from sdopt.engine.pool import EnginePool

RANK = 16
RESULTS = Path(__file__).parent / "results/lora.json"


def write_file(bundle: sdopt.Bundle, path: Path, linears_alone: bool) -> int:
    """Write the random LoRA. Returns the number of its modules."""
    rng, tensors = np.random.default_rng(0), dict[str, Any]()
    shapes = Weights.of(bundle.component("unet")).shapes
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) < 2 or ".attentions." not in name or (linears_alone and len(shape) > 2):
            continue
        stem = "lora_unet_" + module.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((RANK, *shape[1:]), np.float32).astype(np.float16)
        up = rng.standard_normal((shape[0], RANK, *[1] * (len(shape) - 2)), np.float32)
        tensors[f"{stem}.lora_up.weight"] = (up / 1000).astype(np.float16)
    save_file(tensors, path)
    return len(tensors) // 2


def least(name: str, run: Callable[[], Any], rounds: int) -> dict[str, float]:
    """The seconds of the fastest round, by the clock and by the processor."""
    clock, processor = list[float](), list[float]()
    for _ in range(rounds):
        begun, began = time.perf_counter(), time.process_time()
        run()
        clock.append(time.perf_counter() - begun)
        processor.append(time.process_time() - began)
    return {f"{name}_s": round(min(clock), 3), f"{name}_cpu_s": round(min(processor), 3)}


def inputs_of(pool: EnginePool) -> dict[str, Any]:
    """Inputs of the UNet for one image of the bundle's own size, without guidance."""
    manifest = pool.bundle.manifest
    factor, size = manifest.latents.factor, manifest.defaults
    known = {"latent_height": size.height // factor, "latent_width": size.width // factor, "tokens": 77}
    with pool.using("unet") as unet:
        shapes = {s.name: [d if isinstance(d, int) else known.get(d, 1) for d in s.shape] for s in unet.inputs}
        return {s.name: np.ones(shapes[s.name], s.dtype) for s in unet.inputs}


def measured(pool: EnginePool, path: Path, inputs: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds to load a file, to merge it, to open the UNet with it, and of one call of that UNet.

    `as_optimised_anew`: whether the outputs are those of a graph that is optimised with these weights.
    """
    variant = "ort" if pool.backend == "ort" else ""
    loras, weights = Loras(pool.bundle), Weights.of(pool.bundle.component("unet", variant))
    loras.load(path, None)

    def swap() -> None:
        pool.release("unet")
        with pool.using("unet", loras.overlay):
            pass

    row: dict[str, Any] = {
        **least("load", lambda: Loras(pool.bundle).load(path, None), rounds),
        **least("merge", lambda: [0 for _ in loras.overlay.merged("unet", weights, usable_cores())], rounds),
        **least("swap", swap, rounds),
    }
    with pool.using("unet", loras.overlay) as other:
        outputs = other(**inputs)
        row |= least("unet_call", lambda: other(**inputs), rounds)
    pool.release("unet")
    with EnginePool(pool.bundle, pool.backend, cache=False) as new, new.using("unet", loras.overlay) as unet:
        anew = unet(**inputs)
    return {**row, "as_optimised_anew": all((outputs[name] == anew[name]).all() for name in anew)}


def peak_mb(bundle: Path, backend: str, path: Path | None) -> int | None:
    """The largest memory of a process that opens the UNet and, with a file, changes its weights and calls it."""
    command = [sys.executable, __file__, str(bundle), "--backend", backend, "--peak-of", str(path or "")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed)


def print_peak(bundle: sdopt.Bundle, backend: str, path: str) -> None:
    """What `peak_mb` reads."""
    with EnginePool(bundle, backend) as pool:
        inputs = inputs_of(pool)
        loras = Loras(bundle)
        if path:
            loras.load(path, None)
        with pool.using("unet", loras.overlay) as unet:
            unet(**inputs)
    peak = peak_rss_bytes()
    print(peak and peak // 1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--backend", default="ort")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    bundle = sdopt.Bundle.open(args.bundle)
    if args.peak_of is not None:
        print_peak(bundle, args.backend, args.peak_of)
        return
    results: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "model": bundle.manifest.name,
        "random_weights": True,
        "backend": args.backend,
        "rank": RANK,
    }
    with tempfile.TemporaryDirectory() as folder, EnginePool(bundle, args.backend) as pool:
        inputs = inputs_of(pool)
        unet = pool.open("unet")
        unet(**inputs)
        results |= least("unet_call", lambda: unet(**inputs), args.rounds)
        results |= least("plain_open", lambda: (pool.release("unet"), pool.open("unet")), args.rounds)
        pool.release("unet")
        results["peak_mb"] = peak_mb(args.bundle, args.backend, None)
        for kind, linears_alone in (("linears", True), ("all", False)):
            path = Path(folder) / f"{kind}.safetensors"
            count = write_file(bundle, path, linears_alone)
            results[kind] = {"modules": count, **measured(pool, path, inputs, args.rounds)}
            results[kind]["peak_mb"] = peak_mb(args.bundle, args.backend, path)
            print(kind, results[kind], flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.output, json.dumps(results, indent=1) + "\n")
    print(args.output)


if __name__ == "__main__":
    main()
