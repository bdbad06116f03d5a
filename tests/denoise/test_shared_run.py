"""Fused steps of several requests in one run on a fake GPU: each is what it is alone, and nothing is called twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.specs import Array
from sdopt.denoise.batch import Batch, Job, job_of
from sdopt.denoise.shared_run import SharedRun
from sdopt.errors import NumericsError, UsageError
from tests.conftest import EMOJI_BUNDLE
from tests.engine.plans import PARTS, stock
from tests.fakes.gpu import Simulator

PROFILE = "batch=1:1:4 tokens=1:32:64 height=8:128:256 width=8:128:256"
SMALL = {"height": 64, "width": 64}
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red apple", "sampler": "ddim", "num_inference_steps": 5, "seed": 1, **SMALL},
    {"prompt": "a cat", "sampler": "euler_a", "num_inference_steps": 9, "guidance_scale": 3.0, "seed": 2, **SMALL},
    {"prompt": "a fish", "sampler": "dpmpp_2m", "num_inference_steps": 7, "guidance_rescale": 0.5, "seed": 3, **SMALL},
    {"prompt": "the sun", "sampler": "pndm", "num_inference_steps": 6, "seed": 4, **SMALL},
]


@pytest.fixture(scope="module")
def both_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    return stock(EMOJI_BUNDLE, folder / "bundle", [PROFILE], (*PARTS, "unet_step_alone"))


@pytest.fixture
def pipe(both_steps: Path, gpu: Simulator) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(both_steps, backend="tensorrt", verify=False) as opened:
        yield opened


def move(pipe: sdopt.Pipeline, batch: Batch, jobs: list[Job]) -> list[tuple[Job, Any]]:
    with ExitStack() as stack:
        engines = {name: stack.enter_context(pipe.pool.using(name)) for name in jobs[0].engines}
        return batch.advance(jobs, engines)


def together(pipe: sdopt.Pipeline, requests: list[dict[str, Any]], every: int = 1) -> list[Array]:
    """The last latents of every request, each joining `every` turns after the one before."""
    batch, waiting, ready, turns = Batch(), list(requests), list[Job](), 0
    last: dict[int, Array] = {}
    while waiting or batch.jobs:
        if waiting and turns % every == 0:
            options = dict(waiting.pop(0))
            job = job_of(pipe.prepare(pipe.plan(options.pop("prompt"), **options)))
            ready.append(job)
            batch.join(job)
        for jobs in batch.groups().values():
            for job, step in move(pipe, batch, jobs):
                if job.done:
                    job.board.end()
                    last[id(job)] = step.sample
                    job.board.close()
        turns += 1
    batch.close()
    return [last[id(job)] for job in ready]


@pytest.mark.parametrize("every", [1, 3])
def test_requests_that_join_late_are_each_what_they_are_alone(every: int, pipe: sdopt.Pipeline) -> None:
    alone = [pipe(**request, output_type="latent").images for request in REQUESTS]
    for request, own, shared in zip(REQUESTS, alone, together(pipe, REQUESTS, every), strict=True):
        np.testing.assert_allclose(shared, own, rtol=0, atol=2e-5, err_msg=request["sampler"])


def test_a_newcomer_costs_no_call(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
    calls: list[int] = []
    request = {**REQUESTS[0], "num_inference_steps": 6}
    together(pipe, [request])  # contexts exist from now on
    step = next(name for name in pipe.pool.opened if name.startswith("unet_step"))
    engine = pipe.engine(step)
    begin = engine.begin

    def counted(arrays: Any, tables: Any) -> Any:
        run = begin(arrays, tables)
        launch = run.launch
        run.launch = lambda k, **own: (calls.append(len(arrays["sample"])), launch(k, **own))[1]
        return run

    engine.begin = counted
    try:
        together(pipe, [request, {**request, "seed": 2}], every=2)
    finally:
        engine.begin = begin
    assert calls == [1, 1, 2, 2, 2, 2, 1, 1]


def test_while_nobody_joins_only_rows_go_up(pipe: sdopt.Pipeline, gpu: Simulator) -> None:
    options = dict(REQUESTS[0])
    prompt = options.pop("prompt")
    batch = Batch([job_of(pipe.prepare(pipe.plan(prompt, **{**options, "seed": seed}))) for seed in (1, 2)])
    for _ in range(3):
        move(pipe, batch, list(batch.jobs))
    gpu.calls.clear()
    move(pipe, batch, list(batch.jobs))
    seen = list(gpu.calls)
    for job in list(batch.jobs):
        batch.leave(job)
        job.board.close()
    batch.close()
    assert seen == ["wait", "upload", "launch"]


def test_a_mask_keeps_what_it_keeps(pipe: sdopt.Pipeline) -> None:
    rows, columns = np.mgrid[0:64, 0:64]
    image = np.stack([rows / 64, columns / 64, rows * 0 + 0.5], -1).astype(np.float32)
    mask = np.zeros((64, 64), np.float32)
    mask[16:48, 16:48] = 1
    masked = {"prompt": "a heart", "image": image, "mask_image": mask, "num_inference_steps": 6, "seed": 7}
    requests = [REQUESTS[0], masked, REQUESTS[1]]
    alone = [pipe(**request, output_type="latent").images for request in requests]
    for own, shared in zip(alone, together(pipe, requests, 2), strict=True):
        np.testing.assert_allclose(shared, own, rtol=0, atol=2e-5)


def test_calls_with_and_without_guidance_are_of_two_engines(pipe: sdopt.Pipeline) -> None:
    requests = [{**REQUESTS[0], "guidance_interval": (0.3, 0.7)}, {**REQUESTS[1], "guidance_scale": 1.0}]
    alone = [pipe(**request, output_type="latent").images for request in requests]
    for own, shared in zip(alone, together(pipe, requests), strict=True):
        np.testing.assert_allclose(shared, own, rtol=0, atol=2e-5)


def test_more_than_the_engine_takes_is_refused_before_anything_moves(pipe: sdopt.Pipeline) -> None:
    options = dict(REQUESTS[0])
    prompt = options.pop("prompt")
    jobs = [job_of(pipe.prepare(pipe.plan(prompt, **{**options, "seed": seed}))) for seed in range(5)]
    batch = Batch(list(jobs))
    with pytest.raises(UsageError, match="the nearest profile"):
        move(pipe, batch, jobs)
    assert [job.k for job in jobs] == [0] * 5
    move(pipe, batch, jobs[:4])
    assert [job.k for job in jobs] == [1, 1, 1, 1, 0]
    for job in jobs:
        job.board.close()


def test_what_was_not_read_in_time_is_gone(pipe: sdopt.Pipeline) -> None:
    options = dict(REQUESTS[0])
    job = job_of(pipe.prepare(pipe.plan(options.pop("prompt"), **options)))
    batch = Batch([job])
    ((_, step),) = move(pipe, batch, [job])
    job.board.close()
    with pytest.raises(UsageError, match="read it before"):
        _ = step.denoised


def test_a_picture_of_nan_is_told(pipe: sdopt.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedRun, "fetch", lambda self, board, name: np.full((1, 4, 8, 8), np.nan, np.float32))
    options = dict(REQUESTS[0])
    job = job_of(pipe.prepare(pipe.plan(options.pop("prompt"), **options)))
    batch = Batch([job])
    ((_, step),) = move(pipe, batch, [job])
    with pytest.raises(NumericsError, match="step 1 of"):
        _ = step.sample
    job.board.close()
