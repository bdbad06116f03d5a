"""Worker processes that die: their orders are made again, and what kills them twice fails alone."""

from __future__ import annotations

import os
import queue
import signal
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sdopt
from sdopt.engine.cuda_errors import LostContextError
from sdopt.errors import BackendError, BundleError, SdoptError
from sdopt.offline.folders import Disk, make
from sdopt.offline.lines import Line, checked, deciding, lines
from sdopt.offline.makers import OneProcess, Workers, devices
from sdopt.offline.recipe import NAME, Recipe
from sdopt.offline.run import Outcome, made
from sdopt.serve.models import Model
from sdopt.serve.orders import Event, Order
from sdopt.serve.settings import Settings

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")


@dataclass(frozen=True)
class Deadly(Recipe):
    """A pipeline that ends its process when it begins a picture of "poison", as a fault of an engine would."""

    def models(self, settings: Settings) -> dict[str, Model]:
        models = super().models(settings)
        pipe = models[NAME].pipe
        real = pipe.prepare

        def prepare(plan: Any, texts: Any = None) -> Any:
            if plan.prompts == ("poison",):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(plan, texts)

        pipe.prepare = prepare  # pyright: ignore[reportAttributeAccessIssue]
        return models


@dataclass(frozen=True)
class Dead(Recipe):
    """A pipeline that ends its process when it is opened."""

    def models(self, settings: Settings) -> dict[str, Model]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def lined(*prompts: str) -> list[Line]:
    objects = [(f"request {i}", {"id": str(i), "prompt": prompt}) for i, prompt in enumerate(prompts)]
    with sdopt.load() as pipe:
        return lines(objects, checked(SMALL), Disk(Path()), deciding(pipe))


def test_a_line_that_ends_its_process_fails_alone(tmp_path: Path) -> None:
    given, target = lined(*"ab", "poison", *"cdefghij"), Disk(tmp_path)
    make(target)
    with closing(Workers(Deadly(threads=1), devices((), 2), slots=4)) as workers:
        outcomes = {outcome.id: outcome for outcome in made(workers, given, target, target)}
    assert outcomes.pop("2").error == (
        "the process of the engines died while it had this order, twice; the other orders go on"
    )
    assert {id: outcome.status for id, outcome in outcomes.items()} == {
        line.id: "made" for line in given if line.id != "2"
    }
    assert all(target.is_complete(line.name) for line in given if line.id != "2")


def test_workers_that_never_begin_are_given_up() -> None:
    began = time.monotonic()
    with pytest.raises(BackendError, match=r"^3 worker processes died one after the other while they started"):
        Workers(Dead(), [""])
    assert time.monotonic() - began < 60


def test_what_a_worker_says_against_its_bundle_is_raised(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Workers(Recipe(str(tmp_path)), ["", ""])


def test_a_lost_device_ends_the_run_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sdopt.load() as pipe:
        with pipe.pool.using("unet") as unet:
            kind = type(unet)

        def lost(self: Any, **arrays: Any) -> Any:
            raise LostContextError("unet: CUDA error 700")

        maker = OneProcess(pipe)
        monkeypatch.setattr(kind, "__call__", lost)
        with closing(maker), pytest.raises(SdoptError, match=r"CUDA error 700.*; run the same command again to make"):
            list(made(maker, lined("a", "b"), Disk(tmp_path), Disk(tmp_path)))
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        maker.submit(Order("late", NAME, {"prompt": "a", "seed": 1, **SMALL}), events.put)
    assert list(tmp_path.iterdir()) == []


def test_devices_are_taken_in_turns() -> None:
    assert devices((), None) == [""]
    assert devices((), 3) == ["", "", ""]
    assert devices(("cuda:0", "cuda:1"), None) == ["cuda:0", "cuda:1"]
    assert devices(("cuda:0", "cuda:1"), 3) == ["cuda:0", "cuda:1", "cuda:0"]


def test_what_is_there_by_now_is_not_made(tmp_path: Path) -> None:
    given, target = lined("a", "b"), Disk(tmp_path)
    with sdopt.load() as pipe, closing(OneProcess(pipe)) as maker:
        assert [outcome.status for outcome in made(maker, given[:1], target, target)] == ["made"]
        outcomes = list(made(maker, given, target, target))
    assert outcomes[0] == Outcome("0", "kept")
    assert outcomes[1].status == "made"
