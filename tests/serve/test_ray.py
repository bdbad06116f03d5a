"""A real Ray cluster of this machine: the same pictures, and none is lost when a replica is killed."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from tests.conftest import EMOJI_BUNDLE, ROOT
from tests.serve.conftest import RAY, SMALL, Running, free_port, pixels, running, wait_ready
from tests.serve.test_faults import number, raw, until

pytest.importorskip("ray", reason="the extra `ray` is not installed")
LONG = {**SMALL, "num_inference_steps": 100}
REPLICA = re.compile(r"process (\d+)")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with two replicas."""
    own = [] if RAY else ["--ray"]
    options = (*own, "--replicas", 2, "--slots", 2, "--queue", 6, "--drain-seconds", 30)
    with running(tmp_path_factory.mktemp("cluster"), *options) as server:
        yield server


def replicas(server: Running) -> list[int]:
    """The processes of the replicas that take orders."""
    devices = server.get("/health/ready")[1]["devices"]
    return [int(match[1]) for one in devices if (match := REPLICA.search(one["device"]))]


def family(pid: int) -> set[int]:
    """A process and all that it started, directly or not."""
    found, todo = set[int](), [pid]
    while todo:
        found.add(one := todo.pop())
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            todo += [int(child) for child in task.read_text().split()]
    return found


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_both_replicas_make_the_pictures_that_python_makes(cluster: Running, pipe: sdopt.Pipeline) -> None:
    bodies = [{"prompt": "a cat", "seed": seed, **SMALL, "num_inference_steps": 20} for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda body: cluster.post("/v1/images/generations", body), bodies))
    for body, (status, answer) in zip(bodies, answers, strict=True):
        assert status == 200, answer
        expected = pipe("a cat", seed=body["seed"], **SMALL | {"num_inference_steps": 20}).images[0]
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected))
    time.sleep(2.0)  # a replica tells of itself once a second
    text = cluster.get("/metrics")[1].decode()
    calls = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("sdopt_unet_calls{")]
    assert len(calls) == 2
    assert min(calls) > 0


def test_nothing_is_reported_home_and_the_cluster_has_a_token(cluster: Running) -> None:
    for pid in replicas(cluster):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"RAY_USAGE_STATS_ENABLED=0" in environment
        assert b"RAY_AUTH_MODE=token" in environment
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family(cluster.process.pid)]
    assert not [one for one in commands if b"ray-dashboard-" in one]


def test_clients_that_vanish_stop_their_pictures_within_a_step(cluster: Running) -> None:
    before = number(cluster, "sdopt_pictures_total")
    body = {"prompt": "a cat", **SMALL, "height": 256, "width": 256, "num_inference_steps": 150}
    gone = [raw(cluster, body) for _ in range(4)]
    gone += [raw(cluster, {**body, "stream": True, "partial_images": 2}) for _ in range(4)]
    until(lambda: number(cluster, "sdopt_active") >= 4)
    for sock in gone:
        sock.close()
    until(lambda: number(cluster, "sdopt_pictures_total") - before == 8)
    time.sleep(3.0)  # two calls that were under way, and the replicas tell of them
    calls = number(cluster, "sdopt_unet_calls")
    time.sleep(3.0)
    assert number(cluster, "sdopt_unet_calls") == calls
    assert number(cluster, "sdopt_active") == number(cluster, "sdopt_waiting") == 0
    assert cluster.post("/v1/images/generations", {"prompt": "a", "seed": 1, **SMALL})[0] == 200


def test_a_wrong_request_is_refused_at_once_while_others_wait(cluster: Running) -> None:
    with ThreadPoolExecutor(10) as threads:
        waiting = [
            threads.submit(cluster.post, "/v1/images/generations", {"prompt": "a", "seed": seed, **LONG})
            for seed in range(10)
        ]
        until(lambda: number(cluster, "sdopt_waiting") > 0)
        began = time.monotonic()
        wrong = {"prompt": "a", **SMALL, "hires_steps": 3}
        status, answer = cluster.post("/v1/jobs", wrong)
        assert (status, answer["error"]["param"]) == (400, "hires_steps")
        status, answer = cluster.post("/v1/images/generations", {"prompt": "a", **LONG, "deadline": 0.05})
        assert (status, answer["error"]["code"]) == (429, "deadline")
        assert time.monotonic() - began < 20
        assert not all(future.done() for future in waiting)
        assert {future.result()[0] for future in waiting} == {200}


def test_overload_is_refused_with_the_time_to_come_back(cluster: Running) -> None:
    def ask(seed: int) -> tuple[int, Any]:
        body = json.dumps({"prompt": "a", "seed": seed, **LONG}).encode()
        request = urllib.request.Request(
            f"{cluster.url}/v1/images/generations", body, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.headers

    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(ask, range(40)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 16  # two replicas with two slots and six places
    for status, headers in answers:
        if status == 429:
            assert 250 <= int(headers["retry-after-ms"]) <= 120_000
            assert int(headers["retry-after"]) >= 1
    until(lambda: number(cluster, "sdopt_waiting") == 0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_replica_that_is_killed_or_hangs_loses_no_picture(
    how: signal.Signals, cluster: Running, pipe: sdopt.Pipeline
) -> None:
    before = number(cluster, "sdopt_worker_restarts")
    with ThreadPoolExecutor(8) as threads:
        bodies = [{"prompt": "a red apple", "seed": seed, **LONG} for seed in range(8)]
        waiting = [threads.submit(cluster.post, "/v1/images/generations", body) for body in bodies]
        steps = number(cluster, "sdopt_steps_total")
        until(lambda: number(cluster, "sdopt_steps_total") > steps + 5)
        victim = replicas(cluster)[0]
        os.kill(victim, how)
        for body, future in zip(bodies, waiting, strict=True):
            status, answer = future.result()
            assert status == 200, answer
            expected = pipe("a red apple", seed=body["seed"], **LONG).images[0]
            np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected))
    until(lambda: number(cluster, "sdopt_worker_restarts") == before + 1, 60)
    until(lambda: len(replicas(cluster)) == 2, 90)
    assert victim not in replicas(cluster)


def test_sigterm_finishes_what_is_under_way_and_leaves_no_process(cluster: Running) -> None:
    """The last one of this cluster."""
    with ThreadPoolExecutor(2) as threads:
        waiting = [
            threads.submit(cluster.post, "/v1/images/generations", {"prompt": "a", "seed": 1, **LONG}) for _ in "ab"
        ]
        steps = number(cluster, "sdopt_steps_total")
        until(lambda: number(cluster, "sdopt_steps_total") > steps + 2)
        processes = family(cluster.process.pid)
        assert len(processes) > 5
        cluster.process.send_signal(signal.SIGTERM)
        assert [future.result()[0] for future in waiting] == [200, 200]
        assert cluster.process.wait(60) == 0
    until(lambda: not [pid for pid in processes if lives(pid)])
    assert "Traceback" not in cluster.log.read_text()


def test_a_bundle_that_cannot_be_opened_ends_the_command_as_without_ray(tmp_path: Path) -> None:
    own = [] if RAY else ["--ray"]
    with running(tmp_path, str(tmp_path / "nothing"), *own, waits=False) as server:
        assert server.process.wait(120) == 3
        said = server.log.read_text()
        assert "Traceback" not in said
        assert "nothing" in said


def test_the_end_of_the_front_is_the_end_of_its_cluster(tmp_path: Path) -> None:
    own = [] if RAY else ["--ray"]
    with running(tmp_path, *own) as server:
        processes = family(server.process.pid)
        assert len(processes & set(replicas(server))) == 1
        agents = {pid for pid in processes if b"Agent" in Path(f"/proc/{pid}/cmdline").read_bytes()}
        assert len(agents) == 2
        server.process.kill()
        server.process.wait()
        until(lambda: not [pid for pid in processes - agents if lives(pid)])  # Ray's agents notice it in a minute


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster that somebody else has started, with token authentication."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    port, log = free_port(), tmp_path / "head.log"
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
    command += ["--port", str(port), "--ray-client-server-port", str(free_port()), "--num-cpus", "4"]
    folder = tempfile.mkdtemp(prefix="ray-")  # the paths of its sockets are short
    command += ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ})
    try:
        until(lambda: "Ray runtime started" in log.read_text(), 60)
        yield f"127.0.0.1:{port}"
    finally:
        processes = family(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        until(lambda: not [pid for pid in processes if lives(pid)], 60)
        shutil.rmtree(folder, ignore_errors=True)
        current = Path("/tmp/ray/ray_current_cluster")  # Ray leaves it, and `serve run` would wait for that cluster
        if current.is_file() and current.read_text().endswith(f":{port}"):
            current.unlink()


def test_groups_of_bundles_grow_by_their_work_in_a_cluster_that_runs(
    head: str, tmp_path: Path, tiny_bundle: Path, pipe: sdopt.Pipeline
) -> None:
    own = [] if RAY else ["--ray"]
    names = (f"smiley={EMOJI_BUNDLE}", f"tiny={tiny_bundle}", "--lora", "smiley/neon=engines/emoji/neon.safetensors")
    shape = ("--address", head, "--models-per-replica", 1, "--autoscale", "1:2", "--slots", 1, "--queue", 64)
    with running(tmp_path, *names, *own, *shape) as server, sdopt.load(tiny_bundle, threads=1) as tiny:
        first = replicas(server)
        assert len(first) == 2
        listed = {one["id"]: one["sdopt"]["loras"] for one in server.get("/v1/models")[1]["data"]}
        assert listed == {"smiley": ["neon"], "tiny": []}
        status, answer = server.post("/v1/images/generations", {"model": "tiny", "prompt": "a", "seed": 1, "steps": 2})
        assert (status, answer["error"]["param"]) == (400, "steps")
        body = {"model": "tiny", "prompt": "a", "seed": 1, "num_inference_steps": 2}
        status, answer = server.post("/v1/images/generations", body)
        assert status == 200, answer
        other = tiny("a", seed=1, num_inference_steps=2).images[0]
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(other))
        jobs = [
            server.post("/v1/jobs", {"prompt": "a", **SMALL, "n": 10, "num_inference_steps": 150}) for _ in range(6)
        ]
        assert jobs[0][0] == 202
        assert {status for status, _ in jobs} <= {202, 429}  # 429: a slow machine expects a long queue already
        until(lambda: len(replicas(server)) == 3, 90)
        status, answer = server.post("/v1/images/generations", {"model": "smiley", "prompt": "a", "seed": 1, **SMALL})
        assert status == 200, answer
        expected = pipe("a", seed=1, **SMALL).images[0]
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected))
        last = replicas(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        until(lambda: not [pid for pid in {*first, *last} if lives(pid)])


CONFIG = """
proxy_location: HeadOnly
http_options: {{host: 0.0.0.0, port: {port}}}
applications:
  - name: pictures
    import_path: sdopt.serve.ray:app
    route_prefix: /
    args: {{bundles: {{smiley: "{bundle}"}}, threads: 1, max_steps: 50}}
"""


def test_an_application_of_ray_serve_answers_as_the_command_does(tmp_path: Path, pipe: sdopt.Pipeline) -> None:
    config, log, port = tmp_path / "serve.yaml", tmp_path / "serve.log", free_port()
    config.write_text(CONFIG.format(port=port, bundle=EMOJI_BUNDLE))
    command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(config)]
    own = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}  # else it takes any cluster that it finds
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=tmp_path, env=environment)
    server = Running(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_ready(server)
        status, answer = server.post("/v1/images/generations", {"prompt": "a red apple", "seed": 1, **SMALL})
        assert status == 200, answer
        expected = pipe("a red apple", seed=1, **SMALL).images[0]
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected))
        status, answer = server.post("/v1/images/generations", {"prompt": "a", "num_inference_steps": 51})
        assert (status, answer["error"]["param"]) == (400, "num_inference_steps")
        assert server.get("/v1/models")[1]["data"][0]["id"] == "smiley"
        assert server.get("/", host="evil.example")[0] == 403
        machine = server.get("/health/ready")[1]["devices"][0]["device"].partition(" ")[0]
        if not ipaddress.ip_address(machine).is_loopback:  # as another machine would reach it
            outside = Running(f"http://{machine}:{port}", process, log)
            assert outside.get("/v1/models", host="localhost")[0] == 403
        sock = raw(server, {"prompt": "a cat", **SMALL, "height": 256, "width": 256, "num_inference_steps": 50})
        until(lambda: number(server, "sdopt_active") == 1)
        sock.close()
        until(lambda: number(server, "sdopt_active") == 0)
        assert 'outcome="cancelled"' in server.get("/metrics")[1].decode()
    finally:
        processes = family(process.pid)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    until(lambda: not [pid for pid in processes if lives(pid)], 60)
