"""What the server on Ray is told, without a cluster: who may hold what, and mistakes by their names."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.files import embedded
from sdopt.errors import BundleError, UsageError
from sdopt.serve.auth import Keys
from sdopt.serve.board import Board, Reading, Report
from sdopt.serve.gate import Gate
from sdopt.serve.metrics import Metrics
from sdopt.serve.ray import board_name, from_args, groups, sized
from sdopt.serve.remote import RayDevice
from sdopt.serve.settings import Settings
from sdopt.serve.worker import Beat

THREE = {"a": "x/a", "b": "x/b", "c": "x/c"}


class Cluster:
    """What a cluster says of its machines."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self._machines = machines

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": machine} for machine in self._machines]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"ray": True, "autoscale": "8"}, "autoscale"),
        ({"ray": True, "autoscale": "0:8"}, "autoscale"),
        ({"ray": True, "autoscale": "8:1"}, "autoscale"),
        ({"ray": True, "autoscale": "1:8", "replicas": 2}, "autoscale"),
        ({"ray": True, "replicas": 0}, "replicas"),
        ({"ray": True, "models_per_replica": -1}, "models_per_replica"),
        ({"ray": True, "devices": ("cuda:0",)}, "devices"),
        ({"replicas": 2}, "replicas"),
        ({"autoscale": "1:8"}, "autoscale"),
        ({"address": "auto"}, "address"),
        ({"models_per_replica": 1}, "models_per_replica"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(UsageError) as told:
        Settings(THREE, **given)
    assert told.value.param == param


def test_bundles_are_divided_with_their_loras() -> None:
    settings = Settings(THREE, {"all": "l", "a/own": "m", "c/other": "n"}, ray=True, models_per_replica=2)
    first, second = groups(settings)
    assert (dict(first.bundles), dict(first.loras)) == ({"a": "x/a", "b": "x/b"}, {"all": "l", "a/own": "m"})
    assert (dict(second.bundles), dict(second.loras)) == ({"c": "x/c"}, {"all": "l", "c/other": "n"})
    assert len(groups(Settings(THREE, ray=True))) == 1
    assert board_name(first) != board_name(second)


def test_paths_are_those_of_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sd15").mkdir()
    monkeypatch.chdir(tmp_path)
    (one,) = groups(Settings({"emoji": str(embedded()), "sd15": "sd15", "far": "/models/far"}, {"neon": "neon"}))
    assert one.bundles == {"emoji": "", "sd15": str(tmp_path / "sd15"), "far": "/models/far"}
    assert one.loras == {"neon": "neon"}


@pytest.mark.parametrize(
    ("given", "machines", "threads"),
    [
        ({}, [{"CPU": 8.0}], 8),
        ({"replicas": 3}, [{"CPU": 8.0}], 2),
        ({"replicas": 2}, [{"CPU": 4.0}, {"CPU": 16.0}], 10),
        ({"replicas": 1}, [{"CPU": 4.0}, {"CPU": 16.0}], 16),
        ({"autoscale": "1:99"}, [{"CPU": 8.0}], 1),
        ({"models_per_replica": 1}, [{"CPU": 8.0}], 2),
        ({"threads": 4}, [{"CPU": 8.0}], 4),
        ({"backend": "tensorrt"}, [{"CPU": 8.0, "GPU": 1.0}], None),
    ],
)
def test_a_replica_gets_its_part_of_the_processors(
    given: dict[str, Any], machines: list[dict[str, float]], threads: int | None
) -> None:
    assert sized(Settings(THREE, ray=True, **given), Cluster(*machines)).threads == threads


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        ({"threads": 9}, "threads", "the largest machine of the Ray cluster has 8 processors"),
        ({"backend": "tensorrt"}, "backend", "no machine of the Ray cluster has a GPU"),
        ({"backend": "ort:cuda"}, "backend", "no machine of the Ray cluster has a GPU"),
    ],
)
def test_what_no_machine_can_hold_is_refused(given: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as told:
        sized(Settings(THREE, ray=True, **given), Cluster({"CPU": 8.0}, {"CPU": 2.0}))
    assert told.value.param == param


def test_arguments_of_an_application_are_settings_and_may_be_texts(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text("max_steps = 60\nslots = 2\n[bundles]\nsd15 = 'x/sd15'\n")
    settings = from_args({"config": str(config), "replicas": "3", "slots": 4, "trust_engines": "true", "cors": "a,b"})
    assert (settings.ray, settings.replicas, settings.slots, settings.max_steps) == (True, 3, 4, 60)
    assert (settings.trust_engines, settings.cors, dict(settings.bundles)) == (True, ("a", "b"), {"sd15": "x/sd15"})
    assert dict(from_args({"bundle": "sd15=x/sd15,xl=x/xl"}).bundles) == {"sd15": "x/sd15", "xl": "x/xl"}
    assert dict(from_args({"bundles": "sd15=x", "loras": "n=f"}).loras) == {"n": "f"}
    assert list(from_args({}).bundles) == ["emoji"]


@pytest.mark.parametrize(
    ("args", "param"),
    [
        ({"replica": "2"}, "replica"),
        ({"port": "9000"}, "port"),
        ({"replicas": "two"}, "replicas"),
        ({"replicas": 2.5}, "replicas"),
        ({"replicas": True}, "replicas"),
        ({"bundles": "sd15"}, "bundles"),
        ({"bundles": {"sd15": 3}}, "bundles"),
        ({"trust_engines": "perhaps"}, "trust_engines"),
    ],
)
def test_a_wrong_argument_of_an_application_is_refused_by_its_name(args: dict[str, Any], param: str) -> None:
    with pytest.raises(UsageError) as told:
        from_args(args)
    assert told.value.param == param


def test_the_board_keeps_the_newest_report_and_the_first_digests() -> None:
    board = Board()
    assert board.agree({"a": "1"}) == {"a": "1"}
    assert board.agree({"a": "2"}) == {"a": "1"}
    board.unable(UsageError("no"))
    assert str(board.read().error) == "no"
    for memory in (1, 2):
        board.tell("x", Report({}, Beat({}, memory, {})))
    reading = board.read()
    assert (reading.error, [report.beat.memory for _, report in reading.reports.values()]) == (None, [2])
    board.unable(UsageError("again"))
    board.tell("x", Report({}, Beat({}, 3, {})))
    assert str(board.read().error) == "again", "one that works says nothing of one that cannot begin"
    board.tell("y", Report({}, Beat({}, 3, {})))
    assert board.read().error is None
    board.leave("x")
    assert list(board.read().reports) == ["y"]


class Deaf:
    """A board that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self, *_: object) -> None:
        return None


def reading(error: str = "", **ages: float) -> Reading:
    status = {"backlog_seconds": 4.0, "waiting": 0, "active": 0, "calls": 0, "images": 0, "busy_seconds": 0.0}
    report = Report({"a": {"name": "a"}}, Beat(status, 7, {}))
    return Reading({name: (age, report) for name, age in ages.items()}, BundleError(error) if error else None)


def test_replicas_come_and_go_as_the_board_says() -> None:
    device = RayDevice(Settings(THREE, ray=True), least=2, _board=Deaf())

    def seen() -> tuple[str, int, int, str]:
        return device.state, len(device.members), device.restarts, device.problem

    assert seen() == ("starting", 1, 0, "")
    assert device.serves("b"), "what it has is not known yet"
    device._take(reading(x=0.1))
    assert seen() == ("starting", 1, 0, ""), "two are wanted at start"
    device._take(reading(x=0.1, y=0.1))
    assert seen() == ("ready", 2, 0, "")
    assert (device.seconds, device.serves("a"), device.serves("b")) == (4.0, True, False)
    device._take(reading(x=0.1, y=31.0))
    assert seen() == ("ready", 1, 1, ""), "a silent one has died"
    device._take(reading(x=0.1, y=32.0))
    assert seen() == ("ready", 1, 1, ""), "and only once"
    device._take(reading("x is another bundle", x=0.1))
    assert seen() == ("ready", 1, 1, "x is another bundle")
    assert device.members[0].problem == "x is another bundle"
    device._take(reading(x=0.1, z=0.1))
    assert seen() == ("ready", 2, 1, "")
    device._take(reading(z=0.1))
    assert seen() == ("ready", 1, 1, ""), "one that ended in good order has not died"
    device._take(reading())
    assert seen() == ("restarting", 1, 1, "")
    assert [member.state for member in device.members] == ["restarting"]
    device._take(reading(w=0.1))
    assert seen() == ("ready", 1, 1, "")
    device._take(reading("no"))
    device._take(reading("no"))
    assert seen() == ("unable", 1, 1, "no")
    device._take(reading(v=0.1))
    assert seen() == ("ready", 1, 1, "")


@pytest.mark.parametrize(
    ("client", "status"), [(("127.0.0.1", 1), 200), (("::1", 1), 200), (None, 200), (("10.0.0.9", 1), 403)]
)
def test_without_keys_only_callers_of_this_machine_are_answered(client: Any, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")], "client": client}
    asyncio.run(Gate(app, Settings(THREE), Keys.read(""), Metrics())(scope, receive, send))
    assert sent[0]["status"] == status
