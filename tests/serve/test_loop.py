"""The step loop without HTTP: orders of every kind share calls, and each is the picture that Python makes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.bundle.files import Bundle
from sdopt.engine import Engine
from sdopt.engine.cuda_errors import LostContextError
from sdopt.errors import BackendError
from sdopt.serve.costs import Costs
from sdopt.serve.item import cost_of
from sdopt.serve.loop import StepLoop
from sdopt.serve.models import Model
from sdopt.serve.orders import EVERY_STEP, Accepted, Begun, Encoding, Event, Failed, Finished, Moved, Order
from tests.conftest import EMOJI_BUNDLE
from tests.engine.plans import PARTS, stock
from tests.fakes.gpu import Simulator
from tests.serve.conftest import SMALL, pixels

NEON = "engines/emoji/neon.safetensors"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with sdopt.load(threads=1, verify=False) as pipe:
        pipe.load_lora_weights(NEON, "neon")
        pipe.set_adapters([], [])
        yield Model("emoji", pipe, ("neon",))


class Heard:
    """A loop that is turned by hand, and what it has told."""

    def __init__(self, model: Model, **options: Any) -> None:
        self.events: list[Event] = []
        self._lock = threading.Lock()
        self.loop = StepLoop({model.name: model}, self._tell, **options)
        self.loop.costs.cap = lambda kind, pixels, most: most  # type: ignore[method-assign]

    def _tell(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)

    def submit(self, id: str, **options: Any) -> None:
        order = {
            name: options.pop(name)
            for name in ("loras", "caller", "previews", "seconds", "alone", "encoding")
            if name in options
        }
        self.loop.submit(Order(id, "emoji", {"prompt": "a red apple", "seed": 1, **SMALL, **options}, **order))

    def turn(self, ticks: int = 10_000) -> None:
        """Turn until nothing is left."""
        while self.loop.status()["waiting"] + self.loop.status()["active"] and ticks:
            self.loop.tick()
            ticks -= 1

    def end(self) -> None:
        self.loop.stop()

    def of(self, id: str) -> list[Event]:
        return [event for event in self.events if event.id == id]

    def final(self, id: str) -> Any:
        self.end()
        return self.of(id)[-1]


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red apple", "sampler": "ddim", "num_inference_steps": 5, "seed": 1},
    {"prompt": "a cat", "sampler": "euler_a", "num_inference_steps": 9, "guidance_scale": 3.0, "seed": 2},
    {"prompt": "a fish", "sampler": "dpmpp_2m", "num_inference_steps": 7, "guidance_scale": 1.0, "seed": 3},
    {"prompt": "the sun", "num_inference_steps": 4, "height": 96, "width": 64, "seed": 4},
    {"prompt": "a tree", "num_inference_steps": 4, "height": 32, "width": 32, "hires": 2.0, "seed": 5},
    {"prompt": "a house", "num_inference_steps": 6, "guidance_interval": (0.3, 0.8), "seed": 6},
]


def test_orders_that_join_late_are_each_the_picture_alone(model: Model) -> None:
    heard = Heard(model, slots=4)
    for i, request in enumerate(REQUESTS):
        heard.submit(str(i), **request)
        heard.loop.tick()
    heard.turn()
    heard.end()
    for i, request in enumerate(REQUESTS):
        options = {**SMALL, **request}
        expected = model.pipe(**options)
        final = heard.of(str(i))[-1]
        assert isinstance(final, Finished), final
        np.testing.assert_array_equal(pixels(final.content), np.asarray(expected.images[0]), err_msg=str(request))
        moved = [event.index for event in heard.of(str(i)) if isinstance(event, Moved)]
        assert moved == list(range(len(moved)))
        assert len(moved) == cast(Accepted, heard.of(str(i))[0]).calls
    assert heard.loop.images > heard.loop.calls  # some calls were shared


def test_orders_with_a_feature_cache_share_shallow_calls_and_cost_less(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    bundle = Bundle.open(shutil.copytree(EMOJI_BUNDLE, folder / "bundle"), verify=False)
    build(bundle, "ort", cache_depth=1, report=lambda line: None)
    with sdopt.load(bundle.path, "ort", threads=1, verify=False) as pipe:
        heard = Heard(Model("emoji", pipe, ()), slots=4)
        requests = [{"seed": seed, "cache_interval": 4, "num_inference_steps": 8} for seed in range(3)]
        for i, request in enumerate(requests):
            heard.submit(str(i), **request)
        heard.turn()
        heard.end()
        assert (heard.loop.calls, heard.loop.images) == (8, 24)
        for i, request in enumerate(requests):
            final = heard.of(str(i))[-1]
            assert isinstance(final, Finished), final
            expected = pipe("a red apple", **{**SMALL, **request}).images[0]
            np.testing.assert_array_equal(pixels(final.content), np.asarray(expected))
        plain, cached = (pipe.plan("a cat", num_inference_steps=8, **own) for own in ({}, {"cache_interval": 4}))
        costs = Costs()
        costs.record(("emoji", True), plain.width * plain.height, 1, 1.0)
        costs.record(("emoji", True, ("shallow", 1)), plain.width * plain.height, 1, 0.1)
        assert cost_of("emoji", plain, costs, 1) - cost_of("emoji", cached, costs, 1) == pytest.approx(6 * 0.9)


def test_orders_with_loras_beside_orders_without(model: Model) -> None:
    heard = Heard(model)
    weights: list[dict[str, float]] = [{}, {"neon": 1.0}, {}, {"neon": 0.5}]
    for i, loras in enumerate(weights):
        heard.submit(str(i), seed=i, loras=loras)
    heard.turn()
    heard.end()
    for i, loras in enumerate(weights):
        model.pipe.set_adapters(list(loras), list(loras.values()))
        expected = model.pipe("a red apple", seed=i, **SMALL).images[0]
        np.testing.assert_array_equal(pixels(cast(Finished, heard.of(str(i))[-1]).content), np.asarray(expected))
    model.pipe.set_adapters([], [])


def test_a_cancelled_order_moves_no_more(model: Model) -> None:
    heard = Heard(model, slots=1)
    heard.submit("active", num_inference_steps=20)
    heard.submit("waiting")
    heard.submit("other", seed=3)
    heard.loop.tick()
    heard.loop.tick()
    heard.loop.cancel("active")
    heard.loop.cancel("waiting")
    heard.loop.cancel("nobody")
    calls = heard.loop.calls
    heard.loop.tick()
    assert heard.loop.calls == calls + 1  # the other one's
    heard.turn()
    assert cast(Failed, heard.final("active")).reason == "cancelled"
    assert cast(Failed, heard.final("waiting")).reason == "cancelled"
    assert sum(isinstance(event, Moved) for event in heard.of("active")) == 2
    assert isinstance(heard.final("other"), Finished)


@pytest.mark.parametrize(
    ("previews", "steps"), [(0, []), (1, [3]), (3, [1, 3, 5]), (EVERY_STEP, [0, 1, 2, 3, 4, 5, 6])]
)
def test_previews_are_evenly_spaced(previews: int, steps: list[int], model: Model) -> None:
    heard = Heard(model)
    heard.submit("a", previews=previews, num_inference_steps=8, encoding=Encoding("JPEG", 80))
    heard.turn()
    heard.end()
    seen = [event for event in heard.of("a") if isinstance(event, Moved) and event.preview is not None]
    assert [event.index for event in seen] == steps
    assert all(pixels(cast(bytes, event.preview)).shape == (64, 64, 3) for event in seen)


def test_a_queue_says_no_with_the_time_after_which_it_may_say_yes(model: Model) -> None:
    heard = Heard(model, slots=1, queue=2, queue_seconds=1000.0)
    for i in range(4):
        heard.submit(str(i))
    assert [type(heard.of(str(i))[-1]) for i in range(4)] == [Accepted, Accepted, Accepted, Failed]
    refused = cast(Failed, heard.of("3")[-1])
    assert refused.reason == "full"
    assert refused.retry_after == pytest.approx(heard.loop.status()["backlog_seconds"] / 3)
    heard.turn()
    heard.submit("4")
    heard.turn()
    assert isinstance(heard.final("4"), Finished)


def test_work_that_waits_is_bounded_in_seconds_too(model: Model) -> None:
    costs = Costs()
    costs.record(("emoji", True), 64 * 64, 1, 2.0)
    heard = Heard(model, slots=1, queue_seconds=20.0, costs=costs)
    for i in range(3):
        heard.submit(str(i), num_inference_steps=4)
    assert [type(heard.of(str(i))[-1]) for i in range(3)] == [Accepted, Accepted, Failed]
    assert "need" in cast(Failed, heard.of("2")[-1]).message
    heard.turn()
    heard.end()


def test_a_deadline_that_cannot_be_met_is_refused_at_once(model: Model) -> None:
    costs = Costs()
    costs.record(("emoji", True), 64 * 64, 1, 2.0)
    heard = Heard(model, costs=costs)
    heard.submit("impossible", seconds=3.0, num_inference_steps=4)
    refused = cast(Failed, heard.of("impossible")[-1])
    assert (refused.reason, refused.param) == ("usage", "deadline")  # asking again would not help
    heard.submit("first", num_inference_steps=4)
    heard.submit("late", seconds=12.0, num_inference_steps=4)
    refused = cast(Failed, heard.of("late")[-1])
    assert (refused.reason, refused.param) == ("late", None)
    assert "must be in 12.0 s" in refused.message
    heard.submit("in time", seconds=300.0, num_inference_steps=4)
    heard.turn()
    assert isinstance(heard.final("in time"), Finished)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"loras": {"ink": 1.0}}, "lora"),
        ({"height": 33}, "height"),
    ],
)
def test_a_wrong_order_is_refused_before_it_waits(options: dict[str, Any], param: str, model: Model) -> None:
    heard = Heard(model)
    heard.submit("a", **options)
    final = cast(Failed, heard.final("a"))
    assert (final.reason, final.param) == ("usage", param)
    assert heard.loop.status()["waiting"] == 0


def test_an_order_alone_shares_no_call(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = counted(model, monkeypatch)
    heard = Heard(model)
    heard.submit("alone", alone=True, guidance_scale=1.0)
    heard.submit("a", seed=2, guidance_scale=1.0)
    heard.submit("b", seed=3, guidance_scale=1.0)
    heard.turn()
    assert isinstance(heard.final("alone"), Finished)
    assert sorted(rows) == [1] * 4 + [2] * 4


def counted(model: Model, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], None] | None = None) -> list[int]:
    """The rows of each call of the UNet from now on; `fails` may raise for a number of rows."""
    rows: list[int] = []
    with model.pipe.pool.using("unet") as unet:
        real = type(unet).__call__

    def call(self: Engine, **arrays: Any) -> Any:
        if "encoder_hidden_states" in arrays:
            count = len(arrays["encoder_hidden_states"])
            if fails is not None:
                fails(count)
            rows.append(count)
        return real(self, **arrays)

    monkeypatch.setattr(type(unet), "__call__", call)
    return rows


def test_where_memory_is_full_fewer_go_together_and_nobody_fails(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(count: int) -> None:
        if count > 4:
            raise BackendError("unet: the memory of this process is full: out of memory")

    rows = counted(model, monkeypatch, full)
    heard = Heard(model)
    for i in range(4):
        heard.submit(str(i), seed=i)
    heard.turn()
    heard.end()
    assert all(isinstance(heard.of(str(i))[-1], Finished) for i in range(4))
    assert max(rows) == 4


def test_an_engine_that_fails_fails_its_orders_and_the_loop_goes_on(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [1]

    def once(count: int) -> None:
        if left and left.pop():
            raise BackendError("unet: the library says no")

    counted(model, monkeypatch, once)
    heard = Heard(model)
    heard.submit("a")
    heard.turn()
    heard.submit("b")
    heard.turn()
    heard.end()
    assert cast(Failed, heard.of("a")[-1]).reason == "failed"
    assert "the library says no" in cast(Failed, heard.of("a")[-1]).message
    assert isinstance(heard.of("b")[-1], Finished)


def test_a_picture_of_nan_fails_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.pipe.pool.using("unet") as unet:
        real = type(unet).__call__

    def poisoned(self: Engine, **arrays: Any) -> Any:
        outputs = real(self, **arrays)
        if "encoder_hidden_states" in arrays and len(arrays["encoder_hidden_states"]) == 3:
            outputs["noise_pred"][1] = np.nan
        return outputs

    monkeypatch.setattr(type(unet), "__call__", poisoned)
    heard = Heard(model)
    for i in range(3):
        heard.submit(str(i), seed=i, guidance_scale=1.0)
    heard.turn()
    heard.end()
    finals = [heard.of(str(i))[-1] for i in range(3)]
    assert [isinstance(final, Finished) for final in finals] == [True, False, True]
    assert "NaN" in cast(Failed, finals[1]).message or "not finite" in cast(Failed, finals[1]).message


def test_a_lost_device_ends_the_loop_and_no_order(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(count: int) -> None:
        raise LostContextError("unet: CUDA error 700")

    counted(model, monkeypatch, lost)
    heard = Heard(model)
    heard.submit("a")
    heard.loop.tick()
    assert heard.loop.lost is not None
    assert [type(event) for event in heard.of("a")] == [Accepted, Begun]  # a new process makes it again


def test_a_mistake_of_sdopt_is_told_as_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdopt.Pipeline, "prepare", lambda self, plan: 1 / 0)
    heard = Heard(model)
    heard.submit("a")
    heard.turn()
    final = cast(Failed, heard.final("a"))
    assert final.reason == "failed"
    assert "ZeroDivisionError" in final.message


def test_stop_without_drain_ends_between_two_calls(model: Model) -> None:
    heard = Heard(model, slots=1)
    heard.submit("active", num_inference_steps=100)
    heard.submit("waiting", num_inference_steps=100)
    heard.loop.start()
    while not any(isinstance(event, Moved) for event in heard.events):
        pass
    heard.loop.stop(drain=False)
    assert cast(Failed, heard.of("waiting")[-1]).reason == "stopping"
    assert cast(Failed, heard.of("active")[-1]).reason == "cancelled"
    heard.loop.submit(Order("after", "emoji", {"prompt": "a", **SMALL}))
    assert cast(Failed, heard.of("after")[-1]).reason == "stopping"


def test_orders_share_the_fused_steps_of_a_gpu(tmp_path: Path, gpu: Simulator) -> None:
    profile = "batch=1:1:4 tokens=1:32:64 height=8:128:256 width=8:128:256"
    bundle = stock(EMOJI_BUNDLE, tmp_path / "bundle", [profile], (*PARTS, "unet_step_alone"))
    with sdopt.load(bundle, "tensorrt", verify=False) as pipe:
        requests = [{**SMALL, "prompt": "a cat", "seed": i, "num_inference_steps": 3 + i} for i in range(6)]
        alone = [pipe(**request, output_type="latent").images for request in requests]
        costs = Costs()
        costs.record(("emoji", True), 64 * 64, 1, 1.0)
        heard = Heard(Model("emoji", pipe), costs=costs)
        latents: dict[str, Any] = {}
        finish = pipe.finish
        pipe.finish = lambda plan, sample: (
            latents.setdefault(str(plan.seeds[0]), sample) is None or finish(plan, sample)
        )
        for request in requests:
            heard.submit(str(request["seed"]), **request)
            heard.loop.tick()
        heard.turn()
        heard.end()
    assert all(isinstance(heard.of(str(i))[-1], Finished) for i in range(6))
    assert heard.loop.images > 1.5 * heard.loop.calls
    for i, own in enumerate(alone):
        np.testing.assert_allclose(latents[str(i)], own, rtol=0, atol=2e-5)
