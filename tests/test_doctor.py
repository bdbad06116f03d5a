"""The doctor says what would be used, and why."""

from __future__ import annotations

import json

import pytest

from sdopt import engine
from sdopt.cli import main
from sdopt.engine import BACKENDS, choose_backend, installed_backends


def test_it_names_every_backend_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) == set(BACKENDS)
    assert {name for name, entry in found["backends"].items() if "version" in entry} == set(installed_backends())
    assert (found["auto"]["backend"], found["auto"]["precision"]) == choose_backend()
    assert found["embedded_model"] is True
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out
    assert (
        f"auto            {found['auto']['backend']}, float32: float32 makes the picture that diffusers makes" in lines
    )


def test_without_an_engine_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "installed_backends", lambda: ())
    assert main(["doctor"]) == 4
    printed = capsys.readouterr()
    assert "not installed: pip install" in printed.out
    assert "no engine library" in printed.err
