"""Before a worker takes orders: one picture of every bundle, and what calls with more images cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import cast

from sdopt.bundle.specs import Float32
from sdopt.denoise.batch import Batch, job_of
from sdopt.errors import NumericsError, SdoptError
from sdopt.logs import logger
from sdopt.request.plan import Plan
from sdopt.serve.costs import PAYS, Costs
from sdopt.serve.item import DECODE
from sdopt.serve.models import Model
from sdopt.serve.orders import Order

log = logger(__name__)
CALLS = 3  # of each number of images; the quickest counts


def warm(models: Mapping[str, Model], costs: Costs, slots: int) -> None:
    """Make a picture of every bundle, and measure. Raises: SdoptError where a bundle makes none."""
    for name, model in models.items():
        if model.describe()["needs_mask"]:
            log.info("%s: an inpainting model; its first request warms it up", name)
            continue
        options = {"prompt": "a photograph", "seed": 0, "num_inference_steps": CALLS + 1}
        plan = model.plan(Order("warm", name, options))
        sample = _measure(name, model, plan, costs, slots)
        began = time.monotonic()
        model.pipe.finish(plan, sample)
        costs.record((name, DECODE), plan.width * plan.height, 1, time.monotonic() - began)


def _measure(name: str, model: Model, plan: Plan, costs: Costs, slots: int) -> Float32:
    """The seconds of a call with 1, 2, 4, ... images, up to where more do not pay. The last sample of a picture."""
    pixels, before, sample = plan.width * plan.height, 0.0, cast("Float32 | None", None)
    images = 1
    while images <= slots:
        try:
            seconds, last = _call(model, plan, images)
        except SdoptError as error:
            if images == 1:
                raise
            log.info("%s: a call takes at most %d images: %s", name, images // 2, error)
            costs.bound((name, plan.guided), images // 2)
            break
        sample = last if sample is None else sample
        costs.record((name, plan.guided), pixels, images, seconds)
        log.info("%s: a call with %d images takes %.3f s", name, images, seconds)
        if images > 1 and seconds > 2 * PAYS * before:
            break
        before, images = seconds, images * 2
    assert sample is not None  # one image is always tried
    return sample


def _call(model: Model, plan: Plan, images: int) -> tuple[float, Float32]:
    """The seconds of one call with so many images, and the last sample of one of them."""
    batch, best, last = Batch(), float("inf"), cast("Float32 | None", None)
    for _ in range(images):
        batch.join(job_of(model.pipe.prepare(plan)))
    try:
        while batch.jobs:
            with ExitStack() as stack:
                using = model.pipe.pool.using
                engines = {name: stack.enter_context(using(name)) for name in batch.jobs[0].engines}
                began = time.monotonic()
                moved = batch.advance(list(batch.jobs), engines)
            step = moved[-1][1]
            if isinstance(step, NumericsError):
                raise step
            last = step.sample  # on a device, this waits for the call
            best = min(best, time.monotonic() - began)
    finally:
        batch.close()
    assert last is not None  # a plan has calls
    return best, last
