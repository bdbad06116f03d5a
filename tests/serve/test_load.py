"""Many requests of every kind at once: each is the picture that Python makes alone, and none is lost."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import sdopt
from tests.serve.conftest import Running, pixels

PROMPTS = ("a red apple", "a cat", "a blue house", "the sun")
SAMPLERS = ("ddim", "euler_a", "dpmpp_2m", "unipc", "heun", "lms")


def request_of(rng: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": rng.choice(PROMPTS),
        "seed": rng.randrange(1 << 32),
        "sampler": rng.choice(SAMPLERS),
        "num_inference_steps": rng.choice((2, 3, 5)),
        "guidance_scale": rng.choice((1.0, 3.0, 7.5)),
        "height": rng.choice((32, 64)),
        "width": rng.choice((32, 64)),
    }
    if rng.random() < 0.2:
        body |= {"negative_prompt": "green", "prompt_style": "a1111"}
    return body


def test_mixed_requests_of_many_clients(server: Running, pipe: sdopt.Pipeline) -> None:
    rng = random.Random(1)
    bodies = [request_of(rng) for _ in range(120)]

    def ask(body: dict[str, Any]) -> Any:
        while True:
            status, answer = server.post("/v1/images/generations", body)
            if status != 429:
                assert status == 200, answer
                return answer
            time.sleep(0.1)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, bodies))
    for body, answer in zip(bodies, answers, strict=True):
        options = dict(body)
        alone = pipe(options.pop("prompt"), **options).images[0]
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(alone), err_msg=str(body))
