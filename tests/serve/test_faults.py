"""What goes wrong in production: killed workers, clients that vanish, slow and half requests, the end of the server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import sdopt
from tests.serve.conftest import SMALL, Running, free_port, pixels, running, wait_ready


def worker_of(server: Running) -> int:
    """The process of the server's worker."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for child in children:
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    pytest.fail("the server has no worker")


def address(server: Running) -> tuple[str, int]:
    host, _, port = urlsplit(server.url).netloc.partition(":")
    return host, int(port)


def raw(server: Running, body: dict[str, Any], part: float = 1.0) -> socket.socket:
    """A connection on which a request for a picture was sent, or a part of it."""
    content = json.dumps(body).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {urlsplit(server.url).netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    sock = socket.create_connection(address(server), 60)
    sock.sendall(head.encode() + content[: int(len(content) * part)])
    return sock


def number(server: Running, name: str) -> float:
    """A number of /metrics, summed over its labels."""
    lines = server.get("/metrics")[1].decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def until(what: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_that_is_killed_loses_no_picture(tmp_path: Path, pipe: sdopt.Pipeline) -> None:
    with running(tmp_path) as server, ThreadPoolExecutor(6) as threads:
        options = {**SMALL, "num_inference_steps": 40}
        bodies = [{"prompt": "a red apple", "seed": seed, **options} for seed in range(6)]
        waiting = [threads.submit(server.post, "/v1/images/generations", body) for body in bodies]
        until(lambda: number(server, "sdopt_steps_total") > 5)
        os.kill(worker_of(server), signal.SIGKILL)
        for body, future in zip(bodies, waiting, strict=True):
            status, answer = future.result()
            assert status == 200, answer
            expected = pipe("a red apple", seed=body["seed"], **options).images[0]
            np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected))
        health = server.get("/health/ready")[1]
        assert health["devices"][0]["restarts"] == 1
        assert number(server, "sdopt_worker_restarts") == 1


def test_an_order_that_kills_its_worker_twice_fails_and_the_server_lives(tmp_path: Path) -> None:
    with running(tmp_path) as server, ThreadPoolExecutor(1) as threads:
        body = {"prompt": "a", "seed": 1, **SMALL, "num_inference_steps": 150, "height": 512, "width": 512}
        waiting = threads.submit(server.post, "/v1/images/generations", body)
        for _ in range(2):
            steps = number(server, "sdopt_steps_total")
            until(lambda steps=steps: number(server, "sdopt_steps_total") > steps, 60)
            os.kill(worker_of(server), signal.SIGKILL)
        status, answer = waiting.result()
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "twice" in answer["error"]["message"]
        wait_ready(server)
        assert server.post("/v1/images/generations", {"prompt": "a", "seed": 1, **SMALL})[0] == 200


def test_sigterm_finishes_what_is_under_way_and_ends_well(tmp_path: Path) -> None:
    with running(tmp_path) as server, ThreadPoolExecutor(2) as threads:
        body = {"prompt": "a cat", "seed": 1, **SMALL, "num_inference_steps": 60}
        waiting = [threads.submit(server.post, "/v1/images/generations", body) for _ in range(2)]
        until(lambda: number(server, "sdopt_steps_total") > 2)
        worker = worker_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert [future.result()[0] for future in waiting] == [200, 200]
        assert server.process.wait(30) == 0
        assert not Path(f"/proc/{worker}").exists()
        assert "Traceback" not in server.log.read_text()


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        sock = raw(server, {"prompt": "a cat", **SMALL, "height": 512, "width": 512, "num_inference_steps": 150})
        until(lambda: number(server, "sdopt_steps_total") > 0)
        worker = worker_of(server)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
        assert time.monotonic() - began < 15
        until(lambda: not Path(f"/proc/{worker}").exists())
        sock.close()


def test_a_worker_ends_with_its_front(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        worker = worker_of(server)
        server.process.kill()
        server.process.wait()
        until(lambda: not Path(f"/proc/{worker}").exists())


def test_clients_that_vanish_stop_their_pictures(server: Running) -> None:
    before = number(server, "sdopt_pictures_total")
    body = {"prompt": "a cat", **SMALL, "height": 256, "width": 256, "num_inference_steps": 150}
    gone = [raw(server, body) for _ in range(4)]
    gone += [raw(server, {**body, "stream": True, "partial_images": 2}) for _ in range(4)]
    until(lambda: number(server, "sdopt_active") >= 8)
    for sock in gone:
        sock.close()
    until(lambda: number(server, "sdopt_pictures_total") - before == 8)
    until(lambda: number(server, "sdopt_active") == 0)
    steps = number(server, "sdopt_steps_total")
    time.sleep(0.5)
    assert number(server, "sdopt_steps_total") == steps
    assert server.post("/v1/images/generations", {"prompt": "a", "seed": 1, **SMALL})[0] == 200


def test_half_a_request_holds_nobody_up(server: Running) -> None:
    halves = [raw(server, {"prompt": "a cat", **SMALL}, 0.5) for _ in range(20)]
    assert server.post("/v1/images/generations", {"prompt": "a", "seed": 1, **SMALL})[0] == 200
    for sock in halves:
        sock.close()
    assert server.get("/health/ready")[0] == 200


def test_a_client_that_reads_slowly_holds_nobody_up(server: Running) -> None:
    body = {"prompt": "a cat", **SMALL, "n": 4, "height": 256, "width": 256}
    slow = raw(server, body)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    began = time.monotonic()
    for seed in range(3):
        assert server.post("/v1/images/generations", {"prompt": "a", "seed": seed, **SMALL})[0] == 200
    assert time.monotonic() - began < 60
    slow.settimeout(60)
    assert slow.recv(12) == b"HTTP/1.1 200"
    slow.close()


def test_a_port_that_is_taken(server: Running, tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", free_port()))
        sock.listen()
        with running(tmp_path, "--port", sock.getsockname()[1], waits=False) as other:
            assert other.process.wait(60) == 4
            assert "choose another --port" in other.log.read_text()
            assert "Traceback" not in other.log.read_text()


def test_overload_is_refused_in_time_and_memory_stays(tmp_path: Path) -> None:
    with running(tmp_path, "--slots", 2, "--queue", 4) as server:
        results: list[tuple[int, float]] = []
        lock = threading.Lock()

        def ask(seed: int) -> None:
            began = time.monotonic()
            status, answer = server.post("/v1/images/generations", {"prompt": "a", "seed": seed, **SMALL})
            with lock:
                results.append((status, time.monotonic() - began))
            if status == 429:
                assert answer["error"]["code"] == "queue_full"

        with ThreadPoolExecutor(40) as threads:
            list(threads.map(ask, range(80)))
        made = [seconds for status, seconds in results if status == 200]
        refused = [seconds for status, seconds in results if status == 429]
        assert len(made) + len(refused) == 80
        assert len(made) >= 6
        assert refused
        request = urllib.request.Request(
            f"{server.url}/v1/images/generations", b'{"prompt": "a", "num_inference_steps": 4}',
            {"content-type": "application/json"},
        )  # fmt: skip
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        until(lambda: number(server, "sdopt_waiting") == 0)  # a worker tells of itself once a second


def test_a_worker_that_is_silent_is_started_again(tmp_path: Path, pipe: sdopt.Pipeline) -> None:
    with running(tmp_path) as server, ThreadPoolExecutor(2) as threads:
        os.kill(worker_of(server), signal.SIGSTOP)
        waiting = threads.submit(server.post, "/v1/images/generations", {"prompt": "a", "seed": 1, **SMALL})
        began = time.monotonic()
        status, answer = server.post("/v1/images/generations", {"prompt": "a", "deadline": 3.0, **SMALL})
        assert (status, answer["error"]["code"]) == (429, "deadline")
        assert time.monotonic() - began < 10
        until(lambda: server.get("/health/ready")[0] == 503, 90)
        status, answer = waiting.result()
        assert status == 200
        expected = pipe("a", seed=1, **SMALL).images[0]
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected))
        assert server.get("/health/ready")[1]["devices"][0]["restarts"] == 1


def test_two_deaths_fail_only_what_was_under_way_both_times(tmp_path: Path) -> None:
    with running(tmp_path, "--slots", 2) as server, ThreadPoolExecutor(8) as threads:
        bodies = [{"prompt": "a", "seed": i, **SMALL, "num_inference_steps": 60} for i in range(8)]
        waiting = [threads.submit(server.post, "/v1/images/generations", body) for body in bodies]
        for _ in range(2):
            steps = number(server, "sdopt_steps_total")
            until(lambda steps=steps: number(server, "sdopt_steps_total") > steps, 60)
            os.kill(worker_of(server), signal.SIGKILL)
        statuses = [future.result()[0] for future in waiting]
        assert statuses.count(500) <= 1
        assert statuses.count(200) >= 7


def test_a_cancelled_job_is_not_made_by_the_next_worker(tmp_path: Path) -> None:
    with running(tmp_path) as server, ThreadPoolExecutor(1) as threads:
        body = {"prompt": "a", "id": "c1", **SMALL, "num_inference_steps": 150}
        assert server.post("/v1/jobs", body)[0] == 202
        until(lambda: number(server, "sdopt_steps_total") > 0)
        worker = worker_of(server)
        os.kill(worker, signal.SIGSTOP)
        cancelling = threads.submit(server.send, "POST", "/v1/jobs/c1/cancel", b"")
        time.sleep(0.5)
        os.kill(worker, signal.SIGKILL)
        status, job = cancelling.result()
        assert (status, job["status"]) == (200, "cancelled")


def test_sigterm_while_a_worker_starts_ends_at_once(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-seconds", 40, waits=False) as server:
        until(lambda: "loading" in server.log.read_text())
        time.sleep(1.0)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 15
        assert "started again" not in server.log.read_text()


def test_jobs_that_nobody_can_fetch_any_more_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-seconds", 30) as server:
        for _ in range(4):
            assert server.post("/v1/jobs", {"prompt": "a", **SMALL, "n": 4, "num_inference_steps": 150})[0] == 202
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 15
