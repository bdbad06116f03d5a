"""What one step of the loop costs beside the engine: guidance, the sampler's row, checks.

    python benchmarks/loop.py [-o benchmarks/results/loop.json]

The engine is a stand-in that returns at once, so the time of a run is the loop's own; 512x512, guidance on, one image.
`host` is the loop in NumPy. `fused` is the one that queues whole steps on a GPU, over a CUDA and a TensorRT that do
nothing (`Nothing`): the host's own work for one launch, beside which the GPU computes. Its goal is 50 microseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sdopt.bundle.files import Bundle, embedded
from sdopt.bundle.specs import Profile, TensorSpec
from sdopt.engine.cuda import CudaBindings
from sdopt.engine.device import Device
from sdopt.engine.pool import EnginePool
from sdopt.engine.store import Record
from sdopt.engine.trt import TrtEngine
from sdopt.pipeline import Pipeline
from sdopt.request.plan import make_plan
from sdopt.samplers import SAMPLERS
from sdopt.samplers.packed import HISTORY, row_width

STEPS, ROUNDS = 20, 150


class Instant:
    """An engine that answers with the same array every time."""

    inputs = outputs = ()

    def __init__(self, output: np.ndarray) -> None:
        self.output = output

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        return {"noise_pred": self.output}

    def close(self) -> None: ...


class Nothing:
    """`cuda.bindings.runtime`, a TensorRT library, a loaded plan and a context in one, all of which do nothing."""

    cudaEventDisableTiming = cudaEventBlockingSync = cudaStreamNonBlocking = 0  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    profiles = 1

    def __init__(self, record: Record, dims: dict[str, int]) -> None:
        self.record, self.specs = record, {s.name: s for s in (*record.inputs, *record.outputs)}
        self.dims, self.pinned, self.handles = dims, list[np.ndarray](), itertools.count(1)

    def cudaMallocHost(self, nbytes: int) -> tuple[int, int]:  # noqa: N802
        self.pinned.append(np.zeros(nbytes, np.uint8))
        return 0, self.pinned[-1].ctypes.data

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, 1 << 36, 1 << 36

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:  # noqa: N802
        return 0, SimpleNamespace(name=b"no GPU", major=9, minor=0, totalGlobalMem=1 << 36)

    def cudaGetDevice(self) -> tuple[int, int]:  # noqa: N802
        return 0, 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        if "Create" in name or name in ("cudaMalloc", "cudaStreamEndCapture", "cudaGraphInstantiate"):
            return lambda *args: (0, next(self.handles) << 20)
        self.__dict__[name] = call = lambda *args: (0,)
        return call

    # the library, and the plan that it loads
    def runtime(self) -> None: ...
    def runtime_config(self) -> None: ...
    def load(self, runtime: Any, plan: Any, what: str) -> Nothing:
        return self

    def context(self, config: Any) -> Nothing:
        return self

    def names(self, inputs: bool) -> list[str]:
        return [s.name for s in (self.record.inputs if inputs else self.record.outputs)]

    def dtype(self, name: str) -> str:
        return self.specs[name].dtype

    # the context
    def prepare(self, profile: int, shapes: Any, stream: int) -> int:
        return 1 << 20

    def shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].sized(self.dims)

    def capturable(self, stream: int) -> bool:
        return True

    def scratch(self, address: int, nbytes: int) -> None: ...
    def bind(self, name: str, address: int) -> None: ...
    def enqueue(self, stream: int) -> None: ...


def fused_engine(folder: Path) -> TrtEngine:
    """The engine of a fused step of Stable Diffusion 1.5 at 512x512, over `Nothing`."""
    latent = ("batch", 4, "latent_height", "latent_width")
    tokens = ("batch", "tokens", 768)
    shapes = {"sample": latent, "history": (HISTORY, *latent), "noise": latent, "row": ("batch", row_width())}
    shapes |= {"encoder_hidden_states": tokens, "negative_encoder_hidden_states": tokens}
    inputs = tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())
    outputs = {"next_sample": latent, "next_history": (HISTORY, *latent), "denoised": latent}
    record = Record(
        component="unet_step",
        backend="tensorrt",
        inputs=inputs,
        outputs=tuple(TensorSpec(name, "float32", shape) for name, shape in outputs.items()),
        carry={"next_sample": "sample", "next_history": "history"},
        profiles=(Profile.parse("batch=1 tokens=77 latent_height=64 latent_width=64"),),
        environment={},
        sources={},
        options={},
        command="",
    )
    nothing = Nothing(record, {"batch": 1, "tokens": 77, "latent_height": 64, "latent_width": 64})
    plan = folder / "plan"
    plan.write_bytes(b"nothing")
    stored: Any = SimpleNamespace(record=record, checked=lambda name: plan)
    library: Any = nothing
    return TrtEngine(library, Device(CudaBindings(nothing, 0, 13000)), [stored], cache=False)


def measure(pipe: Pipeline, sampler: str, loop: str) -> dict[str, Any]:
    """Milliseconds of one step over ROUNDS runs: median, and the 10th and 90th percentile."""
    edge = 64 * pipe.bundle.manifest.latents.factor
    embeds = np.zeros((1, 77, 768), np.float32)
    options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "height": edge, "width": edge, "seed": 0}
    plan = make_plan(pipe.bundle, "", {**options, "sampler": sampler})
    plan = replace(plan, prompt_embeds=embeds, negative_prompt_embeds=embeds)
    times: list[float] = []
    for _ in range(ROUNDS):
        steps = pipe.steps(plan)
        next(steps)
        next(steps)  # the second one captures the graph, once
        started, count = time.perf_counter(), 0
        while True:
            count += 1
            if next(steps).index + 1 == STEPS or count == STEPS - 2:
                break
        times.append(1e3 * (time.perf_counter() - started) / count)
        steps.close()
    low, *_, high = statistics.quantiles(times, n=10)
    return {
        "loop": loop,
        "sampler": sampler,
        "median_ms": round(statistics.median(times), 4),
        "p10": round(low, 4),
        "p90": round(high, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    names = [n for n, s in SAMPLERS.items() if s.family == SAMPLERS["ddim"].family]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for loop in ("host", "fused"):
            bundle = Bundle.open(embedded())
            if loop == "host":
                given = {"unet": Instant(np.random.default_rng(0).standard_normal((2, 4, 64, 64), np.float32))}
            else:
                given = {"unet_step": fused_engine(Path(folder))}
            pipe = Pipeline(EnginePool(bundle, given=given))
            for name in names:
                r = measure(pipe, name, loop)
                print(f"{loop:<7}{name:<14}{r['median_ms']:>8.3f} ms a step  (p10 {r['p10']:.3f}, p90 {r['p90']:.3f})")
                results.append(r)
            for engine in given.values():
                engine.close()
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
