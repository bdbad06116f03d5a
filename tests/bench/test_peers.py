"""Programs in processes of their own: what they answer, and the error if they do not answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdopt.bench.baseline import Baseline
from sdopt.bench.harness import Setup, add_cold_starts, parity_db, starts_cold
from sdopt.bench.peers import PeerSide, cold_start
from sdopt.bench.protocol import Program, peak_rss_bytes
from sdopt.bench.sides import Inputs
from sdopt.errors import BackendError, UsageError
from tests.bench.records import side
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT, ROOT

INPUTS = Inputs(np.zeros((1, 4, 2, 2), np.float32), {})
PROGRAM = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from sdopt.bench.protocol import memory, serve
def load(message):
    print("chatter on stdout")
    return {{"parts": {{"import": 0.1, "load": 0.2}}, "backend": "b", "precision": "p", "note": "", "versions": {{}},
             "half_level": 0.5 / 255,
             "takes_latents": message["latents"]}}
def run(message):
    if message["picture"]: np.save(message["picture"], np.full((1, 2, 2, 3), 0.25))
    return {{"seconds": 0.125}}
FAULT
serve({{"prepare": lambda m: {{}}, "load": load, "run": run, "memory": memory}})
"""


def command(tmp_path: Path, fault: str = "") -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.replace("FAULT", fault))
    return [sys.executable, str(path)]


def test_a_peer_tells_its_own_seconds_and_gives_its_picture(tmp_path: Path) -> None:
    peer = PeerSide("peer", command(tmp_path), {"latents": True})
    try:
        sample = peer.calls(INPUTS)["picture"]()
    finally:
        peer.close()
    assert sample.seconds == 0.125
    assert sample.output is not None
    assert sample.output.shape == (1, 2, 2, 3)


@pytest.mark.parametrize("convert", [np.round, np.floor], ids=["rounded", "cut"])
def test_a_picture_of_eight_bits_is_compared_up_to_half_a_level(convert: Callable[[np.ndarray], np.ndarray]) -> None:
    picture = np.random.default_rng(0).random((1, 16, 16, 3))
    levels = (convert(picture * 255) + (0.5 if convert is np.floor else 0)) / 255
    other = levels + np.random.default_rng(1).normal(0, 0.03, levels.shape)
    assert parity_db({"p": picture}, {"p": levels}, "p", 1.0) == pytest.approx(58.9, abs=0.3)
    assert parity_db({"p": picture}, {"p": levels}, "p", 1.0, half_level=0.5 / 255) >= 120
    assert parity_db({"p": picture}, {"p": other}, "p", 1.0, half_level=0.5 / 255) <= 32


def test_a_picture_of_other_latents_is_not_compared(tmp_path: Path) -> None:
    peer = PeerSide("peer", command(tmp_path), {"latents": False})
    try:
        assert peer.calls(INPUTS)["picture"]().output is None
    finally:
        peer.close()


def test_a_cold_start_adds_up_and_tells_the_memory(tmp_path: Path) -> None:
    sample, peak = cold_start(command(tmp_path), {"latents": True})
    assert set(sample.parts) == {"start", "import", "load", "picture"}
    assert peak is None or 1e6 < peak < 1e9


def test_the_memory_of_a_process_is_its_own_and_not_its_parents(tmp_path: Path) -> None:
    if peak_rss_bytes() is None:
        pytest.skip("no /proc here")
    ballast = np.ones(50_000_000)
    _, peak = cold_start(command(tmp_path), {"latents": True})
    assert peak is not None
    assert peak < ballast.nbytes


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("sys.exit('it has no library')", "ended without an answer.\nit has no library"),
        ("def load(message): raise ValueError('no such model')", "ValueError: no such model"),
        ("def load(message): return {'parts': {}}", "to 'load': answer.backend is missing; allowed is text"),
        ("def load(message): return {'colour': 1}", "to 'load': answer.colour is unknown; answer has parts"),
        ("def load(message): return [1]", "which is no object"),
    ],
)
def test_a_peer_that_fails_says_why(fault: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=message):
        PeerSide("peer", command(tmp_path, fault), {"latents": True})


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(BackendError, match="no/such/python: cannot be started"):
        Program(["no/such/python"])


@pytest.mark.parametrize("name", ["eager", "eager-float64", "lazy-fp32", "eager-bf16-nchw", ""])
def test_an_unknown_baseline_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(UsageError, match="it is eager or compile, then -fp32, -bf16, -fp16"):
        Baseline.parse(name)


def test_a_baselines_name_is_how_it_runs() -> None:
    assert Baseline.parse("compile-bf16-nhwc") == Baseline("compile-bf16-nhwc", True, "bf16", True)


def test_a_peer_that_does_not_start_again_keeps_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    peers = {"good": command(tmp_path), "bad": command(tmp_path / "bad", "sys.exit('no memory left')")}
    setup = Setup(EMOJI_BUNDLE, EMOJI_CHECKPOINT, threads=1, peers=peers, cold_rounds=2)
    entries = [side(name, {"picture": [1.0]}) for name in peers]
    add_cold_starts(entries, setup, {"latents": True}, lambda line: None)
    assert len(entries[0]["seconds"]["cold_start"]) == 2
    assert entries[1]["seconds"] == {"picture": [1.0]}
    assert "no memory left" in entries[1]["note"]


def test_a_compiled_side_is_not_started_cold_and_says_so() -> None:
    entry = side("compile-fp32", {"picture": [1.0]})
    assert not starts_cold(entry)
    assert "not started cold" in entry["note"]
    assert starts_cold(side("eager-fp32", {"picture": [1.0]}))
    assert not starts_cold(side("peer", {}, kind="peer", failed="it broke", quotable=False))
