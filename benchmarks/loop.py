"""What one step of the loop costs beside the engine: guidance, the sampler's row, checks.

    python benchmarks/loop.py [-o benchmarks/results/loop.json]

The engine is a stand-in that returns at once, so the time of a run is the loop's own; 512x512, guidance on, one image.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdopt.bundle import Bundle, embedded
from sdopt.pipeline import Pipeline
from sdopt.request import make_plan
from sdopt.samplers import SAMPLERS

STEPS, ROUNDS = 20, 150


class Instant:
    """An engine that answers with the same array every time."""

    inputs = outputs = ()

    def __init__(self, output: np.ndarray) -> None:
        self.output = output

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        return {"noise_pred": self.output}

    def close(self) -> None: ...


def measure(pipe: Pipeline, sampler: str) -> dict[str, Any]:
    """Milliseconds of one step over ROUNDS runs: median, and the 10th and 90th percentile."""
    rng = np.random.default_rng(0)
    pipe._engines["unet"] = Instant(rng.standard_normal((2, 4, 64, 64), np.float32))
    edge = 64 * pipe.bundle.manifest["latents"]["factor"]
    embeds = np.zeros((1, 77, 768), np.float32)
    options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "height": edge, "width": edge, "seed": 0}
    options |= {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "sampler": sampler}
    plan = make_plan(pipe.bundle, None, options)
    times: list[float] = []
    for _ in range(ROUNDS):
        steps = pipe.steps(plan)
        next(steps)
        started = time.perf_counter()
        count = sum(1 for _ in steps)
        times.append(1e3 * (time.perf_counter() - started) / count)
    low, *_, high = statistics.quantiles(times, n=10)
    return {
        "sampler": sampler,
        "median_ms": round(statistics.median(times), 4),
        "p10": round(low, 4),
        "p90": round(high, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    pipe = Pipeline(Bundle.open(embedded()))
    names = [n for n, s in SAMPLERS.items() if s.family == SAMPLERS["ddim"].family]
    results = [measure(pipe, name) for name in names]
    for r in results:
        print(f"{r['sampler']:<14}{r['median_ms']:>8.3f} ms a step  (p10 {r['p10']:.3f}, p90 {r['p90']:.3f})")
    if args.output:
        record = {
            "latents": [1, 4, 64, 64],
            "steps": STEPS,
            "rounds": ROUNDS,
            "machine": platform.machine(),
            "numpy": np.__version__,
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
