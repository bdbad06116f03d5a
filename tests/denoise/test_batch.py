"""Image i of any batch equals that image alone: requests of every kind, joining late, on every CPU engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.specs import Array
from sdopt.denoise.batch import Batch, Job
from sdopt.engine import Engine, installed_backends
from sdopt.request.plan import make_plan

PROMPTS = ("a red apple", "a cat", "a blue house", "the sun", "a tree", "a fish", "a car", "a heart")
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "pndm", "dpmpp_2m_sde", "heun")
SMALL = {"height": 96, "width": 64}
REQUESTS: list[dict[str, Any]] = [
    {
        "prompt": prompt,
        "sampler": sampler,
        "num_inference_steps": 5 + 15 * i // 7,
        "guidance_scale": 2.0 + 1.7 * i,
        "seed": 40 + i,
        **SMALL,
    }
    for i, (prompt, sampler) in enumerate(zip(PROMPTS, SAMPLERS, strict=True))
]


@pytest.fixture(scope="module", params=["ort", "openvino"])
def pipe(request: pytest.FixtureRequest) -> Iterator[sdopt.Pipeline]:
    if request.param not in installed_backends():
        pytest.skip(f"{request.param} is not installed")
    with sdopt.load(backend=request.param, verify=False) as opened:
        yield opened


def job_of(pipe: sdopt.Pipeline, engine: Engine, request: dict[str, Any]) -> Job:
    options = dict(request)
    ready = pipe.prepare(make_plan(pipe.bundle, options.pop("prompt"), options))
    return Job(ready.board({"unet": engine}), ready.program)


def together(pipe: sdopt.Pipeline, requests: list[dict[str, Any]], every: int = 1) -> tuple[list[Array], int]:
    """The last latents of every request, each joining `every` steps after the one before; and the largest batch."""
    latents: dict[int, Array] = {}
    largest = 0
    with ExitStack() as stack:
        engine = Watched(stack.enter_context(pipe.pool.using("unet")))
        batch, waiting, jobs = Batch(), list(enumerate(requests)), dict[int, int]()
        moves = 0
        while waiting or batch.jobs:
            if waiting and moves % every == 0:
                index, request = waiting.pop(0)
                job = job_of(pipe, engine, request)
                jobs[id(job)] = index
                batch.join(job)
            for job, step in batch.step():
                if job.done:
                    latents[jobs[id(job)]] = step.sample
            moves += 1
        largest = max(engine.rows)
    return [latents[i] for i in range(len(requests))], largest


class Watched:
    """An engine that counts the rows that it is given."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.rows = list[int]()

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        self.rows.append(len(arrays["encoder_hidden_states"]))
        return self.engine(**arrays)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def alone(pipe: sdopt.Pipeline, request: dict[str, Any]) -> Array:
    return pipe(**request, output_type="latent").images


@pytest.mark.parametrize("every", [1, 2])
def test_eight_requests_of_eight_samplers_that_join_late_are_each_what_they_are_alone(
    every: int, pipe: sdopt.Pipeline
) -> None:
    found, largest = together(pipe, REQUESTS, every)
    assert largest > 2 * 2  # more than two of them shared a call, both halves of guidance each
    for request, latents in zip(REQUESTS, found, strict=True):
        np.testing.assert_array_equal(latents, alone(pipe, request), err_msg=request["sampler"])


def test_guided_and_unguided_requests_large_and_small_ones_share_a_batch_as_far_as_they_agree(
    pipe: sdopt.Pipeline,
) -> None:
    requests = [
        {"prompt": "a cat", "seed": 1, "num_inference_steps": 4, "guidance_scale": 1.0, **SMALL},
        {"prompt": ["a dog", "a fish"], "seed": [2, 3], "num_inference_steps": 5, "guidance_rescale": 0.6, **SMALL},
        {"prompt": "a car", "seed": 4, "num_inference_steps": 6, "guidance_interval": (0.2, 0.7), **SMALL},
        {"prompt": "a bird", "seed": 5, "num_inference_steps": 4, "height": 64, "width": 64, "guidance_batch": 1},
        {"prompt": "the moon", "seed": 6, "num_inference_steps": 4, "guidance_scale": 1.0, **SMALL},
    ]
    found, _ = together(pipe, requests)
    for request, latents in zip(requests, found, strict=True):
        np.testing.assert_array_equal(latents, alone(pipe, request), err_msg=str(request))


def test_a_call_outside_the_interval_shares_the_one_of_a_request_without_guidance(pipe: sdopt.Pipeline) -> None:
    requests = [
        {"prompt": "a cat", "seed": 1, "num_inference_steps": 4, "guidance_scale": 1.0, **SMALL},
        {"prompt": "a car", "seed": 4, "num_inference_steps": 4, "guidance_interval": (0.5, 1.0), **SMALL},
    ]
    with pipe.pool.using("unet") as unet:
        engine = Watched(unet)
        batch = Batch([job_of(pipe, engine, request) for request in requests])
        last: dict[int, Array] = {}
        jobs = list(batch.jobs)
        while batch.jobs:
            last |= {id(job): step.sample for job, step in batch.step()}
    assert engine.rows == [2, 2, 1, 2, 1, 2]  # two calls together, then one row alone and two of guidance, twice
    for job, request in zip(jobs, requests, strict=True):
        np.testing.assert_array_equal(last[id(job)], alone(pipe, request))


def test_a_job_that_leaves_is_not_moved_any_more_and_the_others_are_what_they_are_alone(pipe: sdopt.Pipeline) -> None:
    with pipe.pool.using("unet") as engine:
        batch = Batch()
        jobs = [job_of(pipe, engine, request) for request in REQUESTS[:3]]
        for job in jobs:
            batch.join(job)
        batch.step()
        batch.leave(jobs[1])
        last: dict[int, Array] = {}
        while batch.jobs:
            last |= {id(job): step.sample for job, step in batch.step()}
    assert jobs[1].k == 1
    for i in (0, 2):
        np.testing.assert_array_equal(last[id(jobs[i])], alone(pipe, REQUESTS[i]))
