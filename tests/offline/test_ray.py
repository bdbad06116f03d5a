"""`sdopt batch --ray` on real clusters of this machine: killed actors, killed drivers, and the same pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt.offline import ray as room
from sdopt.offline.recipe import Recipe
from tests.conftest import ROOT
from tests.offline.common import assert_whole, batch, begun, numbered, pictures, pixels, report, until, write_list

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system has no /proc")
SIZE = ("--size", "64x64", "--threads", "1")


@pytest.fixture(autouse=True)
def short_paths(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The token of a cluster is written to this user's home; a cluster that somebody named is not taken."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def below(pid: int) -> Iterator[tuple[int, bytes]]:
    """(pid, command line) of all processes that a process started, and those that they started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    for one in parents:
        above = one
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and one != pid:
            try:
                yield one, Path(f"/proc/{one}/cmdline").read_bytes()
            except OSError:
                continue


def computing(pid: int) -> list[int]:
    """The actors below a driver, their worker processes, and the node itself; Ray's agents of it may linger a while."""
    words = (b"ray::MapWorker", b"spawn_main", b"raylet", b"gcs_server")
    found = [one for one, line in below(pid) if any(word in line for word in words)]
    assert len(found) >= len(words)
    return found


def test_an_actor_and_a_worker_that_are_killed_lose_nothing_and_pictures_are_the_same(tmp_path: Path) -> None:
    count, out = 40, tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(count, steps=30))
    process = begun(path, "-o", out, *SIZE, "--ray", "--workers", "2", "--json")
    until(lambda: process.poll() is not None or list(out.glob("*.png")), 150)
    actor = next(pid for pid, line in below(process.pid) if line.startswith(b"ray::MapWorker"))
    os.kill(actor, signal.SIGKILL)
    there = len(list(out.glob("*.png")))
    until(lambda: process.poll() is not None or len(list(out.glob("*.png"))) > there + 4, 100)
    worker = next(pid for pid, line in below(process.pid) if b"spawn_main" in line)
    os.kill(worker, signal.SIGKILL)
    printed, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    counts = json.loads(printed)
    assert counts["made"] + counts["kept"] == count
    assert_whole(out, [f"fox-{i}" for i in range(count)])
    some = numbered(count, steps=30)[:6]
    assert batch(write_list(path, some), "-o", tmp_path / "alone", *SIZE)[0] == 0
    for id, file in pictures(tmp_path / "alone").items():
        assert np.array_equal(pixels(file), pixels(pictures(out)[id]))


def test_a_driver_that_is_killed_ends_its_cluster_and_is_resumed(tmp_path: Path) -> None:
    count, out = 12, tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(count, steps=40))
    process = begun(path, "-o", out, *SIZE, "--ray", "--workers", "1")
    until(lambda: process.poll() is not None or len(list(out.glob("*.png"))) >= 3, 150)
    started = computing(process.pid)
    process.kill()
    process.communicate()
    until(lambda: not any(is_running(pid) for pid in started), 60)
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    code, printed, errors = batch(path, "-o", out, *SIZE, "--json")
    assert code == 0, errors
    counts = json.loads(printed)
    assert counts["kept"] == len(before) >= 3
    assert counts["made"] == count - len(before)
    assert_whole(out, [f"fox-{i}" for i in range(count)])
    assert all((out / name).stat().st_mtime_ns == changed for name, changed in before.items())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupt_ends_the_cluster_and_leaves_a_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", [*numbered(30, steps=40)])
    process = begun(path, "-o", out, *SIZE, "--ray", "--workers", "1")
    until(lambda: process.poll() is not None or list(out.glob("*.png")), 150)
    started = computing(process.pid)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors
    assert errors.splitlines()[-1] == "sdopt: terminated"
    assert "the same command again makes the rest" in errors
    until(lambda: not any(is_running(pid) for pid in started), 60)
    assert {id for id, line in report(out).items() if line["status"] == "made"} == set(pictures(out))
    for file in out.glob("*.png"):
        pixels(file)


MACHINES = """
import sys
from sdopt.cluster import silence_usage
silence_usage()
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_a_cluster_that_runs_has_an_actor_on_each_machine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(16, steps=20))
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    machines = subprocess.Popen([sys.executable, "-c", MACHINES], cwd=ROOT, **pipes)
    try:
        assert machines.stdout is not None
        address = machines.stdout.readline().strip()
        process = begun(path, "-o", out, *SIZE, "--ray", "--address", address, "--json")
        most, end = 0, time.monotonic() + 150
        while process.poll() is None and time.monotonic() < end:
            most = max(most, sum(line.startswith(b"ray::MapWorker") for _, line in below(machines.pid)))
            time.sleep(0.1)
        process.terminate()
        printed, errors = process.communicate()
    finally:
        machines.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert json.loads(printed)["made"] == 16
    assert_whole(out, [f"fox-{i}" for i in range(16)])
    assert most == 2


def node(cpus: float, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    """A machine as Ray tells of it."""
    return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 1.0, **({"GPU": float(gpus)} if gpus else {})}}


HEAD: dict[str, Any] = {"Alive": True, "Resources": {"memory": 1.0}}  # of a Kubernetes cluster, which runs no tasks


@pytest.mark.parametrize(
    ("nodes", "backend", "workers", "expected"),
    [
        ([node(8)], "ort", None, (1, 7.0, 0)),
        ([node(8)], "ort", 2, (2, 3.0, 0)),
        ([node(2)], "ort", 2, (2, 0.5, 0)),
        ([node(1)], "ort", 1, (1, 0.5, 0)),
        ([node(1), node(1)], "auto", None, (2, 0.5, 0)),
        ([node(16), node(16), node(4), node(16, alive=False)], "openvino", None, (3, 3.0, 0)),
        ([HEAD, node(8), node(8)], "ort", 4, (4, 3.0, 0)),
        ([node(32, 4), node(8)], "tensorrt", None, (4, 1.0, 1)),
        ([node(32, 4)], "ort:cuda", 2, (2, 1.0, 1)),
        ([node(32, 4)], "ort:cpu", None, (1, 31.0, 0)),
    ],
)
def test_actors_fit_on_the_machines_and_leave_a_cpu(
    nodes: list[dict[str, Any]], backend: str, workers: int | None, expected: tuple[int, float, int]
) -> None:
    assert room.shares(nodes, Recipe(backend=backend), workers) == expected
