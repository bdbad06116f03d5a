"""The gate: exit code 5 when slower for sure, 0 when not, 2 when the two cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt.bench.cases import Case
from sdopt.cli.main import main
from tests.bench.records import CASE, record, side, steady


def compare(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], *options: str) -> int:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, entry in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(entry))
    return main(["bench", "compare", *map(str, paths), *options])


def of(seconds: list[float], **machine: Any) -> dict[str, Any]:
    return record(side("sdopt", {"picture": seconds}), **machine)


@pytest.mark.parametrize(
    ("factor", "limit", "code"),
    [(1.0, "5%", 0), (1.04, "5%", 0), (1.10, "5%", 5), (1.10, "20%", 0), (0.5, "0%", 0), (1.10, "5", 5)],
)
def test_the_gate_fails_only_past_its_limit(
    factor: float, limit: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, of(steady(1.0)), of(steady(factor)), "--fail-over", limit) == code
    out, errors = capsys.readouterr()
    assert "one             picture" in out
    assert ("slower by" in errors) == (code == 5)


def test_noise_alone_does_not_fail_the_gate(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    noisy = (1.08 * rng.lognormal(0, 0.3, 12)).tolist()
    assert compare(tmp_path, of(rng.lognormal(0, 0.3, 12).tolist()), of(noisy), "--fail-over", "5%") == 0


def test_without_a_limit_nothing_fails(tmp_path: Path) -> None:
    assert compare(tmp_path, of(steady(1.0)), of(steady(9.0))) == 0


def test_too_few_rounds_are_shown_and_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, of([1.0] * 4), of([2.0] * 4), "--fail-over", "5%") == 0
    assert "not judged: 4 rounds, 5 needed" in capsys.readouterr().out


def test_unlike_machines_are_refused_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = of(steady(1.0)), of(steady(1.0), cpu="Abacus 9001")
    assert compare(tmp_path, old, new) == 2
    assert "Abacus 9000 and Abacus 9001" in capsys.readouterr().err
    assert compare(tmp_path, old, new, "--anyway") == 0


def test_another_gpu_is_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = of(steady(1.0)) | {"gpu": {"name": "Adder", "driver_version": "1"}}
    assert compare(tmp_path, of(steady(1.0)), new) == 2
    assert "GPU: None and Adder" in capsys.readouterr().err


def test_another_case_of_the_same_name_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = record(side("sdopt", {"picture": steady(1.0)}), case=Case(**{**CASE.to_json(), "steps": 30}))
    assert compare(tmp_path, of(steady(1.0)), other) == 2
    assert "nothing in common" in capsys.readouterr().err


def test_two_sides_of_one_run_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = side("sdopt", {"picture": steady(1.0)})
    run = record(ours, side("base", {"picture": steady(1.0)}), side("head", {"picture": steady(1.2)}))
    assert compare(tmp_path, run, run, "--side", "head", "--against", "base", "--fail-over", "5%") == 5
    assert compare(tmp_path, run, run, "--side", "base", "--against", "head", "--fail-over", "5%") == 0
    capsys.readouterr()
    assert compare(tmp_path, run, run, "--side", "hed") == 2
    assert "there are head" in capsys.readouterr().err


def test_the_changes_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(tmp_path, of(steady(1.0)), of(steady(1.5)), "--fail-over", "5%", "--json")
    (change,) = json.loads(capsys.readouterr().out)
    assert change["too_slow"] is True
    assert change["ratio"]["value"] == pytest.approx(1.5)
    assert change["rounds"] == 8


@pytest.mark.parametrize("limit", ["much", "-5%", "nan"])
def test_a_limit_that_is_no_percentage_is_refused(limit: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        compare(tmp_path, of([1.0]), of([1.0]), f"--fail-over={limit}")
    assert ended.value.code == 2
