"""Which cluster is meant, what a wrong address is told, and who decides about Ray's usage report."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from sdopt.cluster import USAGE, connected, silence_usage
from sdopt.errors import BackendError, UsageError


@pytest.mark.parametrize(
    "address", ["ray://10.0.0.1:10001", "10.0.0.1", "10.0.0.1:", ":6379", "a:70000", "a:6379x", "http://a:1", "a:²"]
)
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(UsageError, match=r"allowed are HOST:PORT") as told, connected(address):
        pass
    assert told.value.param == "address"


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "a" * 300])
def test_a_cluster_that_does_not_answer_is_said_to_be_so(host: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with (
        pytest.raises(BackendError, match=f"does not answer.*ray start --head --port {port}"),
        connected(f"{host}:{port}"),
    ):
        pass


def test_the_address_of_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(UsageError, match="nonsense"), connected():
        pass


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(BackendError, match=r'pip install "sdopt\[ray\]"'), connected():
        pass


@pytest.mark.parametrize(
    ("variable", "file", "wanted"),
    [
        (None, None, "0"),
        (None, '{"usage_stats": false}', "0"),
        (None, '{"usage_stats": true}', None),  # Ray reads it
        (None, "no JSON", "0"),
        (None, "[]", "0"),
        ("1", None, "1"),
        ("0", '{"usage_stats": true}', "0"),
    ],
)
def test_the_usage_report_is_off_unless_the_user_decided(
    variable: str | None, file: str | None, wanted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    if file is not None:
        path.write_text(file)
    monkeypatch.setenv("RAY_USAGE_STATS_CONFIG_PATH", str(path))
    monkeypatch.delenv(USAGE, raising=False)
    if variable is not None:
        monkeypatch.setenv(USAGE, variable)
    silence_usage()
    assert os.environ.get(USAGE) == wanted
