"""How much sooner a picture is there with bf16, int8, a guidance interval and a feature cache, beside diffusers.

    sdopt build BUNDLE --backend openvino --precision int8
    sdopt build BUNDLE --backend openvino --precision int8 --cache-depth 1
    python benchmarks/models.py taesd -o build-out/models/taesd
    sdopt export build-out/models/taesd --onto BUNDLE --name tiny
    python benchmarks/sooner.py BUNDLE CHECKPOINT       writes benchmarks/results/sooner.json

First one call of the UNet with both halves of guidance, in turns: PyTorch in float32, OpenVINO in bf16 and in int8, and
the shallow UNet of the cache. Then one picture of each recipe, each in a process of its own, so that its peak memory is
known. Short pictures are made several times, and the median is taken. Loading is not in the times, except in low
memory, where engines are opened when they are needed. Fidelity is the PSNR to diffusers' picture of the same steps and
seed; where a checkpoint has random weights, its pictures are noise, and their PSNR says little: the record says so.
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
from statistics import median
from typing import Any

import numpy as np

from sdopt.bench.machine import machine, versions
from sdopt.bench.protocol import peak_rss_bytes
from sdopt.bundle.disk import write_whole
from sdopt.metrics import psnr

RESULTS = Path(__file__).parent / "results/sooner.json"
LONG_ENOUGH = 3.0  # seconds of pictures, of which the median is taken; a longer picture is made once
PROMPT, SEED = "a photo of a red fox in a snowy forest", 1
DIFFUSERS = "diffusers fp32"
HALF, QUARTER = (0.1, 0.6), (0.1, 0.35)  # 10 and 5 of 20 steps are guided
RECIPES: dict[str, dict[str, Any]] = {  # in turn, each lever comes to those before it
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8"},
    "int8, low memory": {"precision": "int8", "memory": "low"},
    "int8, half of the steps guided": {"precision": "int8", "guidance_interval": HALF},
    "int8, a quarter of the steps guided": {"precision": "int8", "guidance_interval": QUARTER},
    "int8, a quarter guided, every second call full": {
        "precision": "int8", "guidance_interval": QUARTER, "cache_interval": 2,
    },
    "int8, a quarter guided, every third call full": {
        "precision": "int8", "guidance_interval": QUARTER, "cache_interval": 3,
    },
    "int8, a quarter guided, every third call full, tiny autoencoder": {
        "precision": "int8", "guidance_interval": QUARTER, "cache_interval": 3, "vae": "tiny",
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of the UNet's calls")
    parser.add_argument("--random-weights", action="store_true", help="say so in the record")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--picture", nargs=2, help=argparse.SUPPRESS)  # one recipe in this process, and its file
    args = parser.parse_args()
    if args.picture:
        print(json.dumps(picture(args, *args.picture)))
        return
    record: dict[str, Any] = {
        "machine": machine(), "versions": versions(), "prompt": args.prompt, "steps": args.steps,
        "random_weights": args.random_weights, "unet_seconds": unet_calls(args), "pictures": {},
    }  # fmt: skip
    print(json.dumps(record["unet_seconds"], indent=1), flush=True)
    pictures: dict[str, Any] = record["pictures"]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{k}.npy" for k, name in enumerate([DIFFUSERS, *RECIPES])}
        for name, file in files.items():
            command = [sys.executable, __file__, str(args.bundle), str(args.checkpoint), "--steps", str(args.steps)]
            command += ["--prompt", args.prompt]
            done = subprocess.run([*command, "--picture", name, str(file)], stdout=subprocess.PIPE, check=True)
            entry = json.loads(done.stdout.splitlines()[-1])
            first = pictures.get(DIFFUSERS, entry)
            entry["times_as_fast"] = first["seconds"] / entry["seconds"]
            entry["psnr_db"] = psnr(np.load(files[DIFFUSERS]), np.load(file), 1.0)
            pictures[name] = entry
            print(name, entry, flush=True)
            write_whole(args.output, json.dumps(record, indent=1) + "\n")  # after each: the next may fail


def unet_calls(args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of one call of each UNet, the median of the rounds, in turns."""
    import torch
    from diffusers import UNet2DConditionModel

    import sdopt
    from sdopt.engine import open_engine

    bundle = sdopt.Bundle.open(args.bundle)
    rng, size = np.random.default_rng(0), bundle.manifest.defaults.height // bundle.factor
    unet = UNet2DConditionModel.from_pretrained(args.checkpoint / "unet").eval()
    sample = rng.standard_normal((1, 4, size, size), np.float32)
    text = rng.standard_normal((2, 77, unet.config.cross_attention_dim), np.float32)
    both, states = torch.from_numpy(np.concatenate([sample, sample])), torch.from_numpy(text)
    given = {"sample": sample, "timestep": np.full(1, 500, np.float32), "encoder_hidden_states": text}

    def eager() -> Any:
        with torch.inference_mode():
            return unet(both, 500, states, return_dict=False)[0].numpy()

    sides: dict[str, Callable[[], Any]] = {"torch fp32": eager}
    for precision in ("bf16", "int8"):
        engine = open_engine(bundle, "unet", "openvino", precision=precision)
        sides[f"openvino {precision}"] = lambda engine=engine: engine(**given)["noise_pred"]
    shallow = open_engine(bundle, "unet_shallow_1", "openvino", precision="int8")
    deep = next(spec for spec in shallow.inputs if spec.name == "deep")
    features = rng.standard_normal((2, deep.shape[1], size, size), np.float32)
    taken = {spec.name for spec in shallow.inputs}
    less = {name: array for name, array in {**given, "deep": features}.items() if name in taken}
    sides["openvino int8, shallow"] = lambda: shallow(**less)["noise_pred"]
    outputs = {name: run() for name, run in sides.items()}  # and the first call, which is slower
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    exact = outputs["torch fp32"]
    return {
        name: {
            "seconds": median(own),
            "times_as_fast": median(a / b for a, b in zip(times["torch fp32"], own, strict=True)),
            "psnr_db": None if "shallow" in name else psnr(exact, outputs[name]),
        }
        for name, own in times.items()
    }


def picture(args: argparse.Namespace, name: str, file: str) -> dict[str, Any]:
    """Make the picture of one recipe in this process, twice the first step to warm up, and write it to `file`."""
    make = _of_diffusers(args) if name == DIFFUSERS else _of_sdopt(args, dict(RECIPES[name]))
    make(1 if name == DIFFUSERS else 2)  # opens engines, takes memory
    times: list[float] = []
    while sum(times) < LONG_ENOUGH:
        started = time.perf_counter()
        image = make(args.steps)
        times.append(time.perf_counter() - started)
    np.save(file, image)
    return {"seconds": median(times), "peak_bytes": peak_rss_bytes()}


def _of_diffusers(args: argparse.Namespace) -> Callable[[int], Any]:
    import torch
    from diffusers import StableDiffusionPipeline

    from sdopt.bundle.files import Bundle

    guidance = Bundle.open(args.bundle).manifest.defaults.guidance_scale
    pipe = StableDiffusionPipeline.from_pretrained(
        args.checkpoint, safety_checker=None, local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)

    def make(steps: int) -> Any:
        own = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
        return pipe(args.prompt, generator=torch.Generator("cpu").manual_seed(SEED), **own).images[0]

    return make


def _of_sdopt(args: argparse.Namespace, options: dict[str, Any]) -> Callable[[int], Any]:
    import sdopt

    pipe = sdopt.load(args.bundle, "openvino", precision=options.pop("precision"), memory=options.pop("memory", "fast"))

    def make(steps: int) -> Any:
        return pipe(args.prompt, num_inference_steps=steps, seed=SEED, output_type="np", **options).images[0]

    return make


if __name__ == "__main__":
    main()
