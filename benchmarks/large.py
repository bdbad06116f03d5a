"""T5-XXL and the transformer of Stable Diffusion 3.5 at full width: what an export needs, and T5's weights in int8.

    python benchmarks/large.py export t5 --layers 2 6            what a layer adds: seconds, bytes, memory
    python benchmarks/large.py export sd3.5-medium --layers 4 24      24 are all of its blocks: 5 GB in fp16
    python benchmarks/large.py int8 --layers 2                   T5's weights in int8 beside fp32, on each backend
    python benchmarks/large.py plan --layers 2                   the same as a plan of TensorRT-RTX, built without a GPU

Weights are random, in fp16: T5's as its class begins them. Every measurement is made in a process of its own. Memory is
that of the process without files that it has mapped (`anonymous`), and with them (`peak_rss_bytes`): the system may
take mapped files back. Each run replaces its own part of the record.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from sdopt.bench.machine import machine
from sdopt.bundle.disk import write_whole

RESULTS = Path(__file__).parent / "results/large.json"
TOKENS = 256
T5: dict[str, Any] = {  # google/t5-v1_1-xxl, without its decoder
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False, "use_cache": False,
}  # fmt: skip
MEDIUM: dict[str, Any] = {  # stabilityai/stable-diffusion-3.5-medium
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16, "out_channels": 16,
    "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "sample_size": 128,
}  # fmt: skip
DUAL = 13  # blocks with a second attention, the first ones
LAYERS = {"t5": 24, "sd3.5-medium": 24}  # of the whole model
BACKENDS = ("ort", "openvino")


def checkpoint(name: str, layers: int, folder: Path) -> Any:
    """A component with random weights in fp16, as a checkpoint on the disk."""
    import torch
    from diffusers import SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel

    from sdopt.export.checkpoint import Checkpoint
    from sdopt.export.file_weights import without_numbers

    torch.manual_seed(0)
    if name == "t5":
        torch.set_default_dtype(torch.float16)
        T5EncoderModel(T5Config(**T5, num_layers=layers)).save_pretrained(folder / "text_encoder_3")
        torch.set_default_dtype(torch.float32)
        return Checkpoint(folder, {"text_encoder_3": "transformers.T5EncoderModel"})
    dual = tuple(range(min(DUAL, layers)))
    with without_numbers():
        model = SD3Transformer2DModel(**MEDIUM, num_layers=layers, dual_attention_layers=dual)
    for module in model.modules():
        for leaf, weight in list(module.named_parameters(recurse=False)):
            numbers = torch.full(weight.shape, float(leaf == "weight"), dtype=torch.float16)
            if weight.ndim > 1:
                numbers.normal_(std=(3 * weight[0].numel()) ** -0.5)
            module.register_parameter(leaf, torch.nn.Parameter(numbers, requires_grad=False))
    model.half().save_pretrained(folder / "transformer")
    return Checkpoint(folder, {"transformer": "diffusers.SD3Transformer2DModel"})


def loaded(name: str, source: Any) -> Any:
    """The part of a component."""
    from sdopt.export.blocks import t5, transformer
    from sdopt.export.families import sd3

    if name == "t5":
        return t5.part(source, "text_encoder_3")
    model, weights = source.opened("transformer")
    return transformer.part(sd3.Transformer(model), transformer.Shape(16, 4096, 2048, patch=2), weights)


@contextmanager
def watched(found: dict[str, Any]) -> Generator[None]:
    """A context whose seconds and peak of memory are put into `found`."""
    done, peak, started = Event(), [0], time.perf_counter()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], bytes_now("RssAnon"))

    thread = Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found["seconds"] = round(time.perf_counter() - started, 1)
        found["anonymous_bytes"] = peak[0]
        found["peak_rss_bytes"] = bytes_now("VmHWM")


def bytes_now(field: str) -> int:
    """Memory of this process as Linux tells it: "RssAnon", which is no mapped file, or "VmHWM", the peak of all."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def exported(name: str, layers: int, place: Path) -> dict[str, Any]:
    """What an export takes of memory and time."""
    from sdopt.export import component

    found: dict[str, Any] = {"model": name, "layers": layers, "of": LAYERS[name]}
    run_alone("checkpoint", name, layers, place)
    folder = place / "bundle"
    folder.mkdir()
    with watched(found):
        part = loaded(name, opened(name, place))
        found["parameters"] = sum(weight.numel() for weight in part.module.parameters())
        entries = component.write_part(part, folder, 23, 80.0, lambda line: None, lambda phase: None)
    found["parity_db"] = min(result.psnr_db for entry in entries.values() for result in entry.parity)
    return {**found, "checkpoint_bytes": size(place / "checkpoint"), "bundle_bytes": size(folder)}


def opened(name: str, place: Path) -> Any:
    from sdopt.export.checkpoint import Checkpoint

    own = {"t5": ("text_encoder_3", "transformers.T5EncoderModel")}
    component, kind = own.get(name, ("transformer", "diffusers.SD3Transformer2DModel"))
    return Checkpoint(place / "checkpoint", {component: kind})


def written(name: str, layers: int, place: Path) -> dict[str, Any]:
    """A checkpoint, in a process of its own: the memory that it takes is not that of an export."""
    checkpoint(name, layers, place / "checkpoint")
    return {}


def in_int8(name: str, layers: int, place: Path) -> dict[str, Any]:
    """T5 in int8 beside fp32: bytes, memory and parity on each backend."""
    from sdopt import graph
    from sdopt.build.int8_weights import round_weights

    if not (place / "bundle").is_dir():
        exported(name, layers, place)
    source, short = place / "bundle/text_encoder_3.onnx", place / "int8"
    short.mkdir()
    found: dict[str, Any] = {"model": name, "layers": layers, "of": LAYERS[name], "tokens": TOKENS}
    model = graph.load(source)
    with watched(found):
        round_weights(model)
        graph.save(model, short / source.name)
    bytes_of = {"fp16": size(place / "bundle"), "int8-weights": size(short)}
    found["graph_bytes"] = bytes_of
    for backend in BACKENDS:
        rows = {"fp32": run_alone(f"call-{backend}", name, layers, place / "bundle")}
        rows["int8-weights"] = run_alone(f"call-{backend}", name, layers, short)
        found[backend] = rows | {"db": compared(place / "bundle" / f"{backend}.npy", short / f"{backend}.npy")}
    return found


def called(backend: str) -> Callable[[str, int, Path], dict[str, Any]]:
    """Two prompts of `TOKENS` tokens through an engine."""

    def call(name: str, layers: int, place: Path) -> dict[str, Any]:
        import numpy as np

        from sdopt import graph
        from sdopt.bundle.files import Component

        path = place / "text_encoder_3.onnx"
        component = Component("text_encoder_3", path, *graph.specs(graph.load(path)))
        found: dict[str, Any] = {}
        with watched(found):
            if backend == "ort":
                from sdopt.engine.ort import OrtEngine as Engine
            else:
                from sdopt.engine.openvino import OpenVinoEngine as Engine
            own = {"int8_products": False} if backend == "ort" else {}
            engine: Any = Engine(component, **own)
            found["loaded_bytes"] = bytes_now("RssAnon")
            ids = np.random.default_rng(0).integers(0, T5["vocab_size"], (2, TOKENS)).astype(np.int32)
            engine(input_ids=ids)
            started = time.perf_counter()
            (output,) = engine(input_ids=ids).values()
            found["call_seconds"] = round(time.perf_counter() - started, 2)
        np.save(place / f"{backend}.npy", output)
        return found

    return call


def compared(one: Path, other: Path) -> float:
    import numpy as np

    from sdopt.metrics import psnr

    return round(psnr(np.load(one), np.load(other)), 1)


def planned(name: str, layers: int, place: Path) -> dict[str, Any]:
    """The bytes of TensorRT-RTX's plans: all in bf16, and weights in int8 beside it. They are built without a GPU."""
    from dataclasses import asdict

    from sdopt import graph
    from sdopt.build.half import half
    from sdopt.build.int8_weights import round_weights
    from sdopt.build.options import BuildOptions
    from sdopt.build.trt_build import Builder
    from sdopt.bundle.specs import Profile
    from sdopt.engine.trt_api import TensorRT

    if not (place / "bundle").is_dir():
        exported(name, layers, place)
    found: dict[str, Any] = {"model": name, "layers": layers, "of": LAYERS[name]}
    for word in ("bf16", "int8-weights"):
        model = graph.load(place / "bundle/text_encoder_3.onnx")
        inputs = graph.specs(model)[0]
        if word == "int8-weights":
            round_weights(model, for_tensorrt=True)
        half(model, dtype="bfloat16")
        graph.save(model, place / f"{word}.onnx")
        options = asdict(BuildOptions(precision="bf16"))
        builder = Builder(TensorRT("tensorrt-rtx"), options, None, report=lambda line: None, name="t5")
        profile = Profile({"batch": (2, 2, 2), "tokens": (TOKENS, TOKENS, TOKENS)})
        builder.build(place / f"{word}.onnx", place / "plan", inputs, [profile])
        found[word] = {"graph_bytes": size_of(place, f"{word}.onnx*"), "plan_bytes": size_of(place, "plan")}
    return found


def size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


TASKS: dict[str, Callable[[str, int, Path], dict[str, Any]]] = {
    "checkpoint": written,
    "export": exported,
    "int8": in_int8,
    "plan": planned,
    **{f"call-{backend}": called(backend) for backend in BACKENDS},
}


def run_alone(task: str, name: str, layers: int, place: Path) -> dict[str, Any]:
    """A task in a process of its own. Raises: SystemExit if it fails."""
    command = [sys.executable, __file__, task, name, "--layers", str(layers), "--place", str(place)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0 if all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", nargs="?", default="t5", choices=LAYERS)
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.place:
        print(json.dumps(TASKS[args.task](args.model, args.layers[0], args.place)))
        return 0
    for layers in args.layers:
        with tempfile.TemporaryDirectory(prefix="large-") as own:
            found = run_alone(args.task, args.model, layers, Path(own))
        print(json.dumps(found))
        keep(args.output, args.task, found)
    return 0


def keep(path: Path, task: str, found: dict[str, Any]) -> None:
    """Put a measurement into the record, in the place of an earlier one of the same model and layers."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    same = [found["model"], found["layers"]]
    rows = [row for row in old.get(task, []) if [row["model"], row["layers"]] != same]
    record = {**old, "machine": machine(), "units": "s, bytes, dB", task: [*rows, found]}
    write_whole(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
