"""`sdopt serve` measured: what it costs beside the direct call, what step batches change, what overload does.

    python benchmarks/serve.py                                    writes benchmarks/results/serve.json
    python benchmarks/serve.py --backend openvino --precision bf16 -o build-out/serve-bf16.json
    python benchmarks/serve.py --parts own,mixed --requests 1000

Parts, each against real servers in processes of their own:

own        one request after the other, in turns with the same call in this process: the server's own cost of a picture
mixed      many clients at once, requests of every kind: each picture is compared with the one made alone; none is lost
policies   the same random arrivals one by one, in request batches and in step batches; beside each the simulator's
           prediction (`serve_sim`) from the costs that this server measured
overload   ten times what it can do, in open loop: how long those wait that are accepted, and the worker's memory
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import serve_sim
from PIL import Image

import sdopt
from sdopt.bench.machine import machine, versions
from sdopt.bundle.disk import write_whole

RESULTS = Path(__file__).parent / "results/serve.json"
PROMPTS = ("a red apple", "a cat", "a blue house", "the sun", "a tree", "a fish", "a car", "a heart")
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "heun", "dpmpp_2m_sde", "lms")


class Server:
    """A running server."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port, self.process = port, process

    def post(self, body: dict[str, Any]) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/images/generations",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=3600) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            return answer.read().decode()

    def number(self, name: str) -> float:
        """A number of /metrics, summed over its labels."""
        rows = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", self.metrics(), re.MULTILINE)
        return sum(map(float, rows))

    def curve(self, pixels: int, guided: bool = True) -> dict[int, float]:
        """The measured seconds of a call by its images."""
        rows = re.findall(r"^sdopt_call_seconds\{(.*)\} (\S+)$", self.metrics(), re.MULTILINE)
        curve: dict[int, float] = {}
        for labels, value in rows:
            if f"{guided})" in labels and f'pixels="{pixels}"' in labels:
                curve[int(re.search(r'images="(\d+)"', labels)[1])] = float(value)  # type: ignore[index]
        return curve

    def decode(self, pixels: int) -> float:
        rows = re.findall(r"^sdopt_call_seconds\{(.*vae_decoder.*)\} (\S+)$", self.metrics(), re.MULTILINE)
        return next(float(value) for labels, value in rows if f'pixels="{pixels}"' in labels)


@contextlib.contextmanager
def serving(args: argparse.Namespace, *options: object) -> Generator[Server]:
    """A server that is ready."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    own = ["--port", port, "--backend", args.backend, "--precision", args.precision, "--threads", args.threads]
    command = [sys.executable, "-m", "sdopt", "serve", *([args.bundle] if args.bundle else []), *own, *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), stderr=log, stdout=log)
        try:
            for _ in range(6000):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready"):
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode())
                time.sleep(0.1)
            yield Server(port, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def pixels_of(answer: Any) -> Any:
    content = base64.b64decode(answer["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(content)))


def own(args: argparse.Namespace, pipe: sdopt.Pipeline) -> dict[str, Any]:
    """The server's own cost of a picture: its encoding as PNG is in both sides."""
    sides: dict[str, list[float]] = {"server": [], "direct": []}
    different = 0
    options = {"num_inference_steps": 4, "height": args.size, "width": args.size}
    with serving(args) as server:
        for seed in range(args.rounds + 3):
            began = time.perf_counter()
            status, answer = server.post({"prompt": PROMPTS[0], "seed": seed, **options})
            between = time.perf_counter()
            result = pipe(PROMPTS[0], seed=seed, **options)
            content = io.BytesIO()
            result.images[0].save(content, "PNG")
            ended = time.perf_counter()
            assert status == 200, answer
            different += not np.array_equal(pixels_of(answer), np.asarray(result.images[0]))
            if seed >= 3:
                sides["server"].append(between - began)
                sides["direct"].append(ended - between)
    costs = [s - d for s, d in zip(sides["server"], sides["direct"], strict=True)]
    figures = {f"{side}_ms": round(1000 * median(values), 2) for side, values in sides.items()}
    ratio = median(s / d for s, d in zip(sides["server"], sides["direct"], strict=True))
    cost = round(1000 * median(costs), 2)
    return {**figures, "own_cost_ms": cost, "ratio": round(ratio, 3), "pictures": args.rounds, "different": different}


def request_of(rng: random.Random, size: int) -> dict[str, Any]:
    """A request of some kind."""
    half = max(32, size // 2 // 32 * 32)
    body: dict[str, Any] = {
        "prompt": rng.choice(PROMPTS), "seed": rng.randrange(1 << 32), "sampler": rng.choice(SAMPLERS),
        "num_inference_steps": rng.choice((2, 3, 5, 8)), "guidance_scale": rng.choice((1.0, 3.0, 7.5)),
        "height": rng.choice((half, size)), "width": rng.choice((half, size)),
    }  # fmt: skip
    if rng.random() < 0.2:
        body |= {"negative_prompt": "green", "prompt_style": "a1111"}
    if rng.random() < 0.1:
        body |= {"height": half, "width": half, "hires": 2.0, "hires_strength": 0.5}
    return body


def mixed(args: argparse.Namespace, pipe: sdopt.Pipeline) -> dict[str, Any]:
    """Requests of every kind at once, from clients that ask again when they are told to."""
    rng = random.Random(args.seed)
    bodies = [request_of(rng, args.size) for _ in range(args.requests)]
    asked_again = 0
    lock = threading.Lock()

    def ask(body: dict[str, Any]) -> Any:
        nonlocal asked_again
        while True:
            status, answer = server.post(body)
            if status == 200:
                return pixels_of(answer)
            assert status == 429, answer
            with lock:
                asked_again += 1
            time.sleep(0.2)

    with serving(args) as server, ThreadPoolExecutor(args.clients) as threads:
        began = time.perf_counter()
        pictures = list(threads.map(ask, bodies))
        seconds = time.perf_counter() - began
        calls, images = server.number("sdopt_unet_calls"), server.number("sdopt_unet_images")
    different = 0
    for body, picture in zip(bodies, pictures, strict=True):
        options = dict(body)
        alone = pipe(options.pop("prompt"), **options).images[0]
        different += not np.array_equal(picture, np.asarray(alone))
    return {
        "requests": len(bodies), "clients": args.clients, "lost": len(bodies) - len(pictures), "different": different,
        "asked_again": asked_again, "seconds": round(seconds, 1), "images_per_call": round(images / calls, 3),
    }  # fmt: skip


def policies(args: argparse.Namespace, pipe: sdopt.Pipeline) -> dict[str, Any]:
    """The same arrivals under each policy, in open loop, and what the simulator says of them."""
    options: dict[str, tuple[object, ...]] = {
        "one by one": ("--slots", 1),
        "requests": ("--batching", "requests"),
        "steps": (),
    }
    steps, rows, trace = [8, 20, 50], list[dict[str, Any]](), list[serve_sim.Arrival]()
    pixels = args.size * args.size
    for policy, own_options in options.items():
        with serving(args, *own_options, "--queue", 10_000, "--queue-seconds", 1e6) as server:
            for _ in range(3):
                server.post({"prompt": PROMPTS[0], "num_inference_steps": 8, "height": args.size, "width": args.size})
            curve, decode = server.curve(pixels), server.decode(pixels)
            if not trace:
                rate = args.load * serve_sim.capacity(curve, decode, steps)
                trace = serve_sim.poisson(rate, args.arrivals, steps, args.seed)
            calls, images = server.number("sdopt_unet_calls"), server.number("sdopt_unet_images")
            latencies, seconds = open_loop(server, trace, args.size)
            time.sleep(1.5)  # the worker tells of itself once a second
            calls, images = server.number("sdopt_unet_calls") - calls, server.number("sdopt_unet_images") - images
            measured = serve_sim.Outcome(tuple(latencies), seconds, images / calls, tuple(one.steps for one in trace))
            after = server.curve(pixels)
        predicted = serve_sim.simulate(trace, after, decode, policy)
        rows.append({"policy": policy, "by": "measured", **measured.described()})
        rows.append({"policy": policy, "by": serve_sim.NAME, **predicted.described()})
        rows.append({"policy": policy, "by": "measured", "call_seconds": after, "decode_seconds": decode})
    return {"load": args.load, "arrivals": len(trace), "steps": steps, "rows": rows}


def open_loop(server: Server, trace: Sequence[serve_sim.Arrival], size: int) -> tuple[list[float], float]:
    """The latency of each request of a trace, sent at its time whatever the server does; and the whole time."""
    latencies = [0.0] * len(trace)
    began = time.perf_counter()

    def ask(number: int, arrival: serve_sim.Arrival) -> None:
        time.sleep(max(0.0, began + arrival.at - time.perf_counter()))
        sent = time.perf_counter()
        body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "height": size, "width": size}
        status, answer = server.post({**body, "num_inference_steps": arrival.steps})
        assert status == 200, answer
        latencies[number] = time.perf_counter() - sent

    with ThreadPoolExecutor(len(trace)) as threads:
        list(threads.map(ask, range(len(trace)), trace))
    return latencies, time.perf_counter() - began - trace[0].at


def overload(args: argparse.Namespace, pipe: sdopt.Pipeline) -> dict[str, Any]:
    """Ten times as many requests as it can make."""
    steps, slots, queue = [8], 4, 8
    with serving(args, "--slots", slots, "--queue", queue) as server:
        server.post({"prompt": PROMPTS[0], "num_inference_steps": 8, "height": args.size, "width": args.size})
        curve, decode = server.curve(args.size * args.size), server.decode(args.size * args.size)
        rate = 10 * serve_sim.capacity(curve, decode, steps)
        trace = serve_sim.poisson(rate, args.arrivals * 5, steps, args.seed)
        time.sleep(1.5)
        before = server.number("sdopt_worker_memory_bytes")
        made, refused = list[float](), list[float]()
        lock, began = threading.Lock(), time.perf_counter()

        def ask(number: int, arrival: serve_sim.Arrival) -> None:
            time.sleep(max(0.0, began + arrival.at - time.perf_counter()))
            sent = time.perf_counter()
            body = {"prompt": "a cat", "seed": number, "height": args.size, "width": args.size}
            status, _ = server.post({**body, "num_inference_steps": arrival.steps})
            with lock:
                {200: made, 429: refused}[status].append(time.perf_counter() - sent)

        with ThreadPoolExecutor(64) as threads:
            list(threads.map(ask, range(len(trace)), trace))
        time.sleep(1.5)
        after = server.number("sdopt_worker_memory_bytes")
    alone = steps[0] * curve[1] + decode
    return {
        "requests": len(trace), "made": len(made), "refused": len(refused), "slots": slots, "queue": queue,
        "alone_s": round(alone, 3), "p50_of_made_s": round(serve_sim.percentile(made, 50), 3),
        "p99_of_made_s": round(serve_sim.percentile(made, 99), 3), "mean_of_refused_s": round(mean(refused), 4),
        "memory_before_mb": round(before / 1e6), "memory_after_mb": round(after / 1e6),
    }  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace, sdopt.Pipeline], dict[str, Any]]] = {
    "own": own,
    "mixed": mixed,
    "policies": policies,
    "overload": overload,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", help="without it the embedded model")
    parser.add_argument("--backend", default="ort")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=128, help="pixels a side (default: 128)")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=60, help="pictures of `own`")
    parser.add_argument("--requests", type=int, default=1000, help="of `mixed`")
    parser.add_argument("--clients", type=int, default=16, help="of `mixed`")
    parser.add_argument("--arrivals", type=int, default=120, help="of each policy")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with sdopt.load(args.bundle, args.backend, precision=args.precision, threads=args.threads) as pipe:
        result: dict[str, Any] = {
            "bundle": pipe.bundle.manifest.name or pipe.bundle.path.name,
            "random_weights": pipe.bundle.manifest.random_weights is not None,
            "backend": f"{pipe.backend} in {pipe.precision}",
            "threads": args.threads,
            "size": f"{args.size}x{args.size}",
        }
        for name in args.parts.split(","):
            result[name] = PARTS[name](args, pipe)
            print(json.dumps({name: result[name]}, indent=1), flush=True)
    result |= {"machine": machine(), "versions": versions()}
    write_whole(args.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
