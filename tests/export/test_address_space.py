"""Where this process may take little address space, an export ends with a sentence before it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdopt.engine import address_space
from sdopt.errors import BackendError
from tests.conftest import EMOJI_CHECKPOINT, ROOT

resource = pytest.importorskip("resource", reason="this system limits no address space")


def limited(nbytes: int, *command: str) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))

    return subprocess.run(
        [sys.executable, *command], preexec_fn=limit, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60
    )


def test_a_limit_below_what_the_libraries_take_is_named(tmp_path: Path) -> None:
    done = limited(1_000_000_000, "-m", "sdopt", "export", str(EMOJI_CHECKPOINT), "-o", str(tmp_path / "bundle"))
    assert done.returncode == 4
    assert "this process may take 1.00 GB of address space (ulimit -v), and an export takes about " in done.stderr
    assert "raise the limit: ulimit -v unlimited" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_space, "limit", lambda: 100_000_000_000)
    address_space.require_for_export(5_000_000_000)
    with pytest.raises(BackendError, match=r"100.00 GB of address space .*ulimit -v"):
        address_space.require_for_export(50_000_000_000)
    monkeypatch.setattr(address_space, "limit", lambda: None)
    address_space.require_for_export(50_000_000_000)


def test_the_limit_is_that_of_the_process() -> None:
    code = "from sdopt.engine.address_space import limit; print(limit())"
    assert limited(2_000_000_000, "-c", code).stdout == "2000000000\n"
