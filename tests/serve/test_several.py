"""Several bundles, and several workers: each request gets its model, and the work is shared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import sdopt
from tests.conftest import EMOJI_BUNDLE
from tests.serve.conftest import SMALL, pixels, running


def test_bundles_by_name_with_loras_of_their_own(tmp_path: Path, tiny_bundle: Path, pipe: sdopt.Pipeline) -> None:
    neon = "engines/emoji/neon.safetensors"
    options = (f"smiley={EMOJI_BUNDLE}", f"tiny={tiny_bundle}", "--lora", f"smiley/neon={neon}")
    with running(tmp_path, *options) as server, sdopt.load(tiny_bundle, threads=1) as tiny:
        listed = {one["id"]: one["sdopt"] for one in server.get("/v1/models")[1]["data"]}
        assert {name: model["loras"] for name, model in listed.items()} == {"smiley": ["neon"], "tiny": []}
        bodies = [
            {"model": "smiley", "prompt": "a red apple", "seed": 1, **SMALL},
            {"model": "tiny", "prompt": "a red apple", "seed": 1, "num_inference_steps": 2},
            {"prompt": "a red apple", "seed": 1, **SMALL},
        ]
        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(lambda body: server.post("/v1/images/generations", body), bodies))
        assert [status for status, _ in answers] == [200, 200, 200]
        own, other, default = (pixels(answer["data"][0]["b64_json"]) for _, answer in answers)
        np.testing.assert_array_equal(own, np.asarray(pipe("a red apple", seed=1, **SMALL).images[0]))
        np.testing.assert_array_equal(own, default)
        np.testing.assert_array_equal(other, np.asarray(tiny("a red apple", seed=1, num_inference_steps=2).images[0]))
        status, answer = server.post("/v1/images/generations", {**bodies[1], "lora": {"neon": 1.0}})
        assert (status, answer["error"]["param"]) == (400, "lora")


def test_two_workers_share_the_work(tmp_path: Path, pipe: sdopt.Pipeline) -> None:
    with running(tmp_path, "--backend", "ort", "--device", "cpu", "--device", "cpu") as server:
        assert len(server.get("/health/ready")[1]["devices"]) == 2
        bodies = [{"prompt": "a cat", "seed": seed, **SMALL, "num_inference_steps": 20} for seed in range(8)]
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda body: server.post("/v1/images/generations", body), bodies))
        for body, (status, answer) in zip(bodies, answers, strict=True):
            assert status == 200
            expected = pipe("a cat", seed=body["seed"], **SMALL | {"num_inference_steps": 20}).images[0]
            np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected))
        text = server.get("/metrics")[1].decode()
        calls = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("sdopt_unet_calls{")]
        assert len(calls) == 2, "each device has a number of its own"
