"""A running server with the embedded model: the real command, in a process of its own."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from tests.conftest import ROOT

for needed in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(needed, reason="the extra `server` is not installed")

RAY = ["--ray"] if os.environ.get("SDOPT_TESTS_RAY") else []  # the same tests, with a replica of Ray Serve
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4}


@dataclass
class Running:
    """A server. `url` has no slash at its end."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.send("GET", path, None, **headers)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return self.send("POST", path, json.dumps(body).encode(), **{"content-type": "application/json", **headers})

    def send(self, method: str, path: str, body: bytes | None, **headers: str) -> tuple[int, Any]:
        """The status and the body, read as JSON where it is JSON."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"{self.url}{path}", body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        with contextlib.suppress(ValueError):
            return status, json.loads(content)
        return status, content


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(folder: Path, *options: object, waits: bool = True) -> Generator[Running]:
    """A server with these options, ended by SIGTERM when the block ends."""
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "sdopt", "serve", "--port", str(port), "--threads", "1", *RAY, *map(str, options)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT, env={**os.environ})
    server = Running(f"http://127.0.0.1:{port}", process, log)
    try:
        if waits:
            wait_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(server: Running, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.process.poll() is None, server.log.read_text()
        with contextlib.suppress(OSError):
            if server.get("/health/ready")[0] == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"the server is not ready: {server.log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that leave it as it is."""
    with running(tmp_path_factory.mktemp("server"), "--lora", "neon=engines/emoji/neon.safetensors") as one:
        yield one


@pytest.fixture(scope="session")
def pipe() -> Iterator[sdopt.Pipeline]:
    """The same model in this process, to compare with."""
    with sdopt.load(threads=1) as opened:
        yield opened


def pixels(content: str | bytes) -> Any:
    """The pixels of an encoded picture, in base64 or not."""
    data = base64.b64decode(content) if isinstance(content, str) else content
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
