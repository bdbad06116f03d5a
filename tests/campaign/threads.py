"""Storms: many threads with many requests on one pipeline, on every backend. Meanwhile it is closed and released.

In every second storm LoRA files come and go too, and the process forks. Each picture is bit for bit the one that its
request gives alone, with the LoRA or without it; so is that of a forked child.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import sdopt
from sdopt.engine import installed_backends
from tests.campaign.cases import CRASH, DONE, FOREIGN, HANG, OTHER, Case, Outcome
from tests.campaign.loras import small_lora, written
from tests.campaign.sandbox import Sandbox

THREADS, CALLS = 8, 5
CHILD_SECONDS = 30.0
CPU = ("ort", "openvino")


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    backends = [name for name in CPU if name in installed_backends()]
    backend = backends[case.number % len(backends)]
    memory = ("fast", "low")[case.number // 2 % 2]
    swaps = case.number // 4 % 2 == 1
    folder, edge = (sandbox.bundles["emoji"], 32) if backend == "ort" else _smallest(sandbox)
    what = f"{THREADS} threads on {backend}, memory={memory}{', LoRA files and forks' if swaps else ''}"
    requests = [_request(rng, edge) for _ in range(6)]
    style = written(sandbox.folder / "storm.safetensors", *small_lora(folder))
    with sdopt.load(folder, backend, threads=1) as alone:
        right = [[alone(**request).images] for request in requests]
        if swaps:
            alone.load_lora_weights(style, "style")
            for request, images in zip(requests, right, strict=True):
                images.append(alone(**request).images)
    wrong: list[Outcome] = []
    with sdopt.load(folder, backend, threads=1, memory=memory) as pipe:
        threads = [
            threading.Thread(target=_storm, args=(pipe, i, requests, right, wrong, case)) for i in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(rng.uniform(0.02, 0.2))
            rng.choice((pipe.close, lambda: pipe.release("unet"), lambda: pipe.release("text_encoder"), _nothing))()
            if swaps:
                rng.choice((lambda: _swap(pipe, style), lambda: _fork(pipe, requests[0], right[0], wrong)))()
    return Outcome(wrong[0].name, what, wrong[0].detail) if wrong else Outcome(DONE, what)


def _swap(pipe: Any, style: Path) -> None:
    """The LoRA comes into use, or goes."""
    if pipe.get_list_adapters():
        pipe.unload_lora_weights()
    else:
        pipe.load_lora_weights(style, "style")


def _fork(pipe: Any, request: dict[str, Any], right: list[Any], wrong: list[Outcome]) -> None:
    """A child makes a picture, while the threads of its parent go on."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            images = pipe(**request).images
            code = int(not any(np.array_equal(images, one) for one in right))
        finally:
            os._exit(code)
    end = time.monotonic() + CHILD_SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            wrong.append(Outcome(HANG, "", f"a forked child has no picture after {CHILD_SECONDS} s"))
            return
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(ended[1])
    if code:
        name = {1: OTHER, 2: FOREIGN}.get(code, CRASH)
        wrong.append(Outcome(name, "", f"a forked child ends with {code}"))


def _smallest(sandbox: Sandbox) -> tuple[Any, int]:
    """OpenVINO compiles each graph for seconds whenever it is opened again: the smallest bundle will do."""
    return (sandbox.bundles["tiny"], 16) if "tiny" in sandbox.bundles else (sandbox.bundles["emoji"], 32)


def _nothing() -> None:
    """This time the pipeline is left alone."""


def _request(rng: random.Random, edge: int) -> dict[str, Any]:
    own = {
        "prompt": rng.choice(("a red apple", "a cat", "blue")), "seed": rng.randint(0, 99), "output_type": "np",
        "num_inference_steps": rng.choice((1, 2, 3)), "height": edge, "width": rng.choice((edge, 2 * edge)),
        "guidance_scale": rng.choice((1.0, 5.0)), "prompt_style": rng.choice(("plain", "a1111")),
        "num_images_per_prompt": rng.choice((1, 1, 2)),
    }  # fmt: skip
    if rng.random() < 0.3:
        own |= {"image": np.full((edge, edge, 3), 0.4, np.float32), "width": edge, "num_inference_steps": 4}
        own |= {"strength": 0.5}
    return own


def _storm(pipe: Any, number: int, requests: list[Any], right: list[Any], wrong: list[Outcome], case: Case) -> None:
    rng = random.Random(f"{case} {number}")
    for _ in range(CALLS):
        i = rng.randrange(len(requests))
        try:
            if rng.random() < 0.2:  # a loop that is left in the middle
                keywords = {name: value for name, value in requests[i].items() if name != "output_type"}
                next(pipe.denoise(**keywords))
                continue
            images = pipe(**requests[i]).images
        except BaseException as error:
            import traceback

            wrong.append(Outcome(FOREIGN, "", "".join(traceback.format_exception(error))[-3000:]))
            return
        if not any(np.array_equal(images, one) for one in right[i]):
            wrong.append(Outcome(OTHER, "", f"request {i}: {requests[i]}"))
