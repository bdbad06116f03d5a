"""The ladder of `benchmarks/gpu.py` climbs on whatever a part does, and what it needs is where it is wanted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sdopt.bench.cases import read_cases
from tests.conftest import ROOT

PROGRAM = """
import json, os, signal, subprocess, sys, time
options, result = json.load(open(sys.argv[2])), sys.argv[4]
part = options["part"]
if part == "good":
    json.dump({"device": "Fake", "weights": "trained", "seconds": {"step": [0.002, 0.001, 0.003]}}, open(result, "w"))
elif part == "bad":
    sys.exit("it has no library")
elif part == "wordy":
    sys.exit("sdopt: error: there is no NVIDIA driver\\nsdopt build ended with 4")
elif part == "lacking":
    print("python has no torch, which this part needs"); sys.exit(4)
elif part == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
elif part == "slow":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(os.path.join(options["output"], "child"), "w").write(str(child.pid))
    print("it has begun", flush=True)
    time.sleep(60)
elif part == "silent":
    pass
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def climb(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a ladder of parts that do what their names say; (exit code, lines by part)."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(*parts: Any, budget: float = 100) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(gpu, "LADDER", parts)
        words = ["--budget", str(budget), "-o", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        code = gpu.main([*words, "--engines-python", f"{sys.executable} {program}"])
        lines = list(map(json.loads, (tmp_path / "out/parts.jsonl").read_text().splitlines()))
        return code, {line["part"]: line for line in lines if "part" in line}

    return run


def part(gpu: ModuleType, name: str, **changes: Any) -> Any:
    return gpu.Part(name, "facts", "emoji", **{"seconds": 1, "limit": 30, **changes})


def test_a_part_that_fails_or_crashes_is_a_line_and_the_next_one_begins(gpu: ModuleType, climb: Any) -> None:
    names = ("bad", "crash", "silent", "lacking", "good")
    code, lines = climb(*(part(gpu, name) for name in names))
    assert code == 1
    assert tuple(lines) == names
    assert lines["bad"]["status"] == "failed"
    assert "it has no library" in lines["bad"]["said"]
    assert lines["crash"]["status"] == "crashed: SIGSEGV"
    assert lines["silent"]["status"] == "failed"
    assert (lines["lacking"]["status"], lines["lacking"]["reason"]) == (
        "left out",
        "python has no torch, which this part needs",
    )
    assert lines["good"]["result"]["device"] == "Fake"


def test_a_part_is_stopped_at_its_limit_with_all_that_it_started(gpu: ModuleType, climb: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    _, lines = climb(part(gpu, "slow", limit=2), part(gpu, "good"))
    assert time.monotonic() - started < 20
    assert lines["slow"]["status"] == "stopped at its limit"
    assert "it has begun" in lines["slow"]["said"]
    assert lines["good"]["status"] == "ok"
    assert not _runs(int((tmp_path / "out/child").read_text()))


def test_a_part_is_left_out_for_want_of_time_or_of_another(gpu: ModuleType, climb: Any) -> None:
    parts = [part(gpu, "bad"), part(gpu, "good", needs=("bad",)), part(gpu, "slow", seconds=500)]
    code, lines = climb(*parts)
    assert code == 1
    assert lines["good"]["reason"] == "it needs bad, which did not end well in this run"
    assert "planned with 500" in lines["slow"]["reason"]


def test_lines_are_there_when_the_ladder_is_killed(gpu: ModuleType, tmp_path: Path) -> None:
    program, output = tmp_path / "program.py", tmp_path / "out"
    program.write_text(PROGRAM)
    ladder = "gpu.LADDER = tuple(gpu.Part(n, 'facts', 'emoji', 1, 60) for n in ('good', 'slow'))"
    words = ["-o", str(output), "--work", str(tmp_path), "--engines-python", f"{sys.executable} {program}"]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu; {ladder}; gpu.main({words})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (output / "child").is_file() or not (output / "child").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.wait(20)
    assert json.loads((output / "parts.jsonl").read_text().splitlines()[-1])["part"] == "good"
    assert not _runs(int((output / "child").read_text()))


def _runs(number: int) -> bool:
    """Whether a process is there, and no zombie; a moment is given to it to end."""
    for _ in range(40):
        try:
            state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


def test_the_table_has_medians_and_reasons(gpu: ModuleType, climb: Any, tmp_path: Path) -> None:
    climb(part(gpu, "good"), part(gpu, "bad"))
    text = gpu.table(tmp_path / "out/parts.jsonl")
    assert "| good | Fake | trained | step | 2.000 ms |" in text
    assert "| bad | - | - | failed | it has no library |" in text


def test_a_table_of_two_runs_into_one_folder_has_the_newest_lines(gpu: ModuleType, climb: Any, tmp_path: Path) -> None:
    climb(part(gpu, "good"))
    climb(part(gpu, "good"))
    assert gpu.table(tmp_path / "out/parts.jsonl").count("| good |") == 1


def test_a_part_that_fails_tells_its_error(gpu: ModuleType, climb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = climb(part(gpu, "wordy"))
    assert lines["wordy"]["reason"] == "there is no NVIDIA driver"
    assert "wordy: failed there is no NVIDIA driver" in capsys.readouterr().err


def test_a_table_of_no_run_says_what_to_type() -> None:
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--table", "none.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr
        == "gpu.py: --table none.jsonl: there is no such file; `gpu.py -o FOLDER` writes FOLDER/parts.jsonl\n"
    )


def test_every_part_can_be_done_and_stands_behind_what_it_needs(gpu: ModuleType) -> None:
    does = importlib.import_module("gpu_parts").DOES
    cases = read_cases(ROOT / "benchmarks/cases.toml")
    for ladder in (gpu.LADDER, gpu.CPU):
        names = [p.name for p in ladder]
        assert len(set(names)) == len(names)
        for i, p in enumerate(ladder):
            assert p.does in does
            assert p.model in cases
            assert set(p.needs) <= set(names[:i])
            assert p.seconds <= p.limit <= 600
            assert cases[p.model].on(p.backend, p.precision).picture_floor_db > 0


def test_the_first_minutes_show_a_picture_and_a_step_of_stable_diffusion(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--list"]) == 0
    ends = {line.split()[0]: int(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert ends["emoji-replay"] <= 60
    assert max(ends["sd15-step"], ends["sd15-picture"], ends["sd15-eager"]) <= 300
    assert max(ends["sd15-compile"], ends["sd15-dynamic"]) <= 600


def test_gpu_tests_are_collected_without_torch_and_the_like(tmp_path: Path) -> None:
    for name in ("torch", "diffusers", "transformers", "hypothesis", "scipy", "openvino", "tensorrt_rtx"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('this machine does not have it')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    collected = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--collect-only",
            "-p", "no:hypothesispytest", "-p", "no:schemathesis",  # plugins that import what is missing
        ],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert collected.returncode == 0, collected.stdout
    assert "tests/engine/test_gpu.py" in collected.stdout
    assert "error" not in collected.stdout.lower()


def test_the_workflow_pins_its_actions_and_asks_for_little() -> None:
    text = (ROOT / ".github/workflows/gpu-bench.yml").read_text()
    uses = [line.split("uses:")[1].split() for line in text.splitlines() if "uses:" in line]
    assert len(uses) >= 3
    for action in uses:
        assert len(action[0].split("@")[1]) == 40
        assert action[1] == "#"
    assert "permissions:\n  contents: read\n" in text
    assert "pull_request_target" not in text


def test_the_workflow_measures_also_when_a_test_fails_and_has_the_engines_library() -> None:
    text = (ROOT / ".github/workflows/gpu-bench.yml").read_text()
    assert 'engines/bin/pip install --quiet ".[tensorrt,cpu]" pytest' in text
    assert "engines/bin/python -m pytest -q -m gpu" in text
    steps = {block.splitlines()[0].strip(): block for block in text.split("      - name: ")[1:]}
    for name in ("What only a GPU can show", "This commit and the other in turns", "The tables", "The gate"):
        (block,) = (block for title, block in steps.items() if title.startswith(name))
        assert "if: always()" in block
    assert "continue-on-error" not in text  # what failed ends the job red
