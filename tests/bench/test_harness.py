"""A real run on the embedded model: sdopt beside diffusers, a peer that works and one that does not."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from sdopt.bench.record import read
from sdopt.bench.sides import COMPONENTS
from sdopt.cli.main import main
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT, ROOT

PEER = (
    f"{sys.executable} -c \"import sys; sys.path.insert(0, '{ROOT}'); import sdopt.bench.child as c; c.main('sdopt')\""
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one command wrote: two rounds, two steps at 64x64."""
    folder = tmp_path_factory.mktemp("bench")
    cases = folder / "cases.json"
    case = {"model": "emoji", "width": 64, "height": 64, "steps": 2, "guidance": 2.0, "backend": "ort:cpu"}
    cases.write_text(json.dumps({"small": case}))
    arguments = ["bench", EMOJI_BUNDLE, "--baseline", EMOJI_CHECKPOINT, "--baselines", "eager-fp32"]
    arguments += ["--cases", cases, "--case", "small", "--rounds", 2, "--cold-rounds", 1, "--threads", 1]
    arguments += ["--device", "cpu", "--peer", f"other={PEER}", "--peer", "broken=no/such/program"]
    arguments += ["--json", folder / "run.json", "--report", folder / "run.md"]
    assert main(list(map(str, arguments))) == 0
    return {"record": read(folder / "run.json"), "report": (folder / "run.md").read_text()}


def sides(run: dict[str, Any]) -> dict[str, Any]:
    return {side["name"]: side for side in run["record"]["results"][0]["sides"]}


def test_every_component_of_every_side_has_every_round(run: dict[str, Any]) -> None:
    for name in ("sdopt", "eager-fp32"):
        series = sides(run)[name]["seconds"]
        assert set(series) == {*COMPONENTS, "cold_start"} - {"step", "host_step"}
        assert {len(taken) for part, taken in series.items() if part != "cold_start"} == {2}
        assert len(series["cold_start"]) == 1
    assert set(sides(run)["other"]["seconds"]) == {"picture", "cold_start"}


def test_the_pictures_that_were_timed_are_pytorchs(run: dict[str, Any]) -> None:
    for name in ("sdopt", "other"):
        assert sides(run)[name]["parity"]["picture_db"] >= 60
        assert sides(run)[name]["quotable"]
    assert sides(run)["sdopt"]["parity"]["unet_db"] >= 80
    assert sides(run)["eager-fp32"]["parity"] == {"picture_db": 200.0, "unet_db": 200.0}


def test_a_side_that_cannot_be_measured_says_why_and_stops_nobody(run: dict[str, Any]) -> None:
    broken = sides(run)["broken"]
    assert "no/such/program: cannot be started" in broken["failed"]
    assert not broken["seconds"]
    assert "- broken could not be measured" in run["report"]


def test_a_cold_start_is_the_sum_of_its_parts_and_ours_needs_less_memory(run: dict[str, Any]) -> None:
    for side in (sides(run)[name] for name in ("sdopt", "eager-fp32", "other")):
        parts = [side["parts"][f"cold_start.{part}"][0] for part in ("start", "import", "load", "picture")]
        assert sum(parts) == pytest.approx(side["seconds"]["cold_start"][0], rel=0.05)
    ours, theirs = (sides(run)[name]["memory"]["peak_rss_bytes"] for name in ("sdopt", "eager-fp32"))
    assert ours < theirs / 2  # no PyTorch in it


def test_the_record_tells_the_machine_and_the_command(run: dict[str, Any]) -> None:
    entry = run["record"]
    assert entry["machine"]["cores"] >= 1
    assert {"python", "sdopt", "numpy", "onnxruntime", "torch", "diffusers"} <= set(entry["versions"])
    assert entry["command"].startswith(f"sdopt bench {EMOJI_BUNDLE} --baseline {EMOJI_CHECKPOINT}")
    assert "--rounds 2" in entry["command"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--baselines", "eager-float31"], 2, "it is eager or compile"),
        (["--rounds", "0"], 2, "1 or more rounds"),
        (["--peer", "eager-fp32=x"], 2, "named twice"),
        (["--case", "none", "--cases", str(ROOT / "benchmarks/cases.toml")], 2, "case 'none' is not known"),
        (["--baseline", "no/checkpoint"], 3, "is not a diffusers checkpoint folder"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(EMOJI_BUNDLE), "--baseline", str(EMOJI_CHECKPOINT), "--device", "cpu", *options]
    assert main(words) == code
    out, errors = capsys.readouterr()
    assert message in errors
    assert not out


def test_the_gpu_ladder_runs_where_there_is_none(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks/gpu.py"))["main"]
    only = ["--only", "facts", "--only", "emoji-ort", "--only", "emoji-beside"]
    words = ["--device", "cpu", "--budget", "600", "--rounds", "1", *only, "--work", str(tmp_path / "work")]
    assert main([*words, "-o", str(tmp_path)]) == 0
    header, facts, ours, beside = map(json.loads, (tmp_path / "parts.jsonl").read_text().splitlines())
    assert header["command"].startswith("python benchmarks/gpu.py --device cpu")
    assert "onnxruntime" in facts["result"]["versions"]
    assert ours["result"]["picture_db"] >= 60
    assert len(ours["result"]["seconds"]["unet"]) == 1
    (result,) = read(tmp_path / beside["result"]["record"])["results"]
    assert [side["name"] for side in result["sides"]] == ["sdopt", "eager-fp32"]
