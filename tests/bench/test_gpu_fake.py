"""`benchmarks/gpu.py`, its parts and `sdopt bench` from end to end, in processes whose GPU and TensorRT are stand-ins.

Nothing here is a measurement: every line says that its device is the fake one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdopt.bench.cases import Case
from sdopt.bench.record import read
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT, ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
CASE = Case("emoji", "emoji", 64, 64, 3, 4.0).on("tensorrt", "fp16")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fake")


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    """Runs Python in a process that sees the stand-ins in place of NVIDIA's libraries."""
    path = os.pathsep.join([str(ROOT / "tests/fakes"), str(ROOT)])
    folders = {"XDG_STATE_HOME": str(home / "state"), "XDG_CACHE_HOME": str(home / "cache")}
    environment = {**os.environ, **folders, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}

    def process(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)

    return process


@pytest.fixture(scope="module")
def lines(home: Path, run: Run) -> dict[str, Any]:
    """The lines of the ladder's first minute."""
    words = ["--smoke", "--budget", 300, "--rounds", 2, "-o", home / "out", "--work", home / "work"]
    only = [word for name in ("facts", "build", "picture", "replay") for word in ("--only", _emoji(name))]
    done = run("benchmarks/gpu.py", *words, *only)
    assert done.returncode == 0, done.stderr
    return {line["part"]: line for line in map(json.loads, (home / "out/parts.jsonl").read_text().splitlines()[1:])}


def _emoji(name: str) -> str:
    return name if name == "facts" else f"emoji-{name}"


def test_the_first_minute_of_the_ladder(lines: dict[str, Any], home: Path) -> None:
    assert [line["status"] for line in lines.values()] == ["ok"] * 4
    assert set(lines["emoji-build"]["result"]["engines"]) == {"unet_step", "text_encoder", "vae_decoder"}
    picture = lines["emoji-picture"]["result"]
    assert picture["picture_db"] >= CASE.picture_floor_db
    assert len(picture["loop"]["host_step"]) == 2 * (CASE.steps - 1)
    assert len(picture["loop"]["device_step"]) == 2 * (CASE.steps - 1)
    assert {"step", "step.device", "vae_decoder.device", "picture"} <= set(picture["seconds"])
    assert picture["peak_device_bytes"] > 1 << 20
    assert lines["emoji-replay"]["result"]["bit_for_bit"] is True
    assert (home / "out/emoji-picture.png").is_file()


def test_nothing_of_it_is_said_to_be_a_gpus(lines: dict[str, Any]) -> None:
    devices = {line["result"]["device"] for name, line in lines.items() if name != "emoji-build"}
    assert devices == {"Fake GPU"}
    assert lines["facts"]["result"]["nvidia_smi"] is None or "Fake" not in str(lines["facts"]["result"]["nvidia_smi"])


@pytest.fixture
def does(lines: dict[str, Any], home: Path, run: Run, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs one part by what it does; its result."""

    def part(does: str, precision: str = "fp16", **changes: Any) -> dict[str, Any]:
        folders = {name: str(home / name) for name in ("work", "models", "skeletons")}
        case = CASE.on("tensorrt", precision).to_json()
        options = {"part": does, "does": does, "case": case, "rounds": 2, "output": str(tmp_path), **folders, **changes}
        (tmp_path / "options.json").write_text(json.dumps(options))
        done = run("benchmarks/gpu_parts.py", tmp_path / "options.json", "-o", tmp_path / "result.json")
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "result.json").read_text())

    return part


def test_a_step_on_inputs_from_a_generator(does: Callable[..., dict[str, Any]]) -> None:
    answer = does("step")
    assert len(answer["seconds"]["step.device"]) == 2
    assert answer["loop"]["host_step"]


def test_parity_with_the_processor(does: Callable[..., dict[str, Any]]) -> None:
    answer = does("parity")
    assert answer["unet_db"] >= CASE.unet_floor_db
    assert answer["picture_db"] >= CASE.picture_floor_db


def test_the_decoder_alone_in_float32(does: Callable[..., dict[str, Any]]) -> None:
    answer = does("vae", "fp32", static=False)
    assert answer["vae_db"] >= 50
    assert answer["build"]["engines"]["vae_decoder"]["precision"] == "fp32"
    assert (answer["build"]["engines"]["vae_decoder"]["profiles"]) == [
        "batch=1:1:4 latent_height=8:8:12 latent_width=8:8:12"
    ]


def test_a_model_that_is_only_a_skeleton_is_built_and_measured(
    does: Callable[..., dict[str, Any]], home: Path, run: Run
) -> None:
    case = Case("small", "small", 64, 64, 2, 4.0).on("tensorrt", "fp16").to_json()
    skeleton = home / "skeletons/small"
    if not skeleton.is_dir():
        assert run("benchmarks/skeleton.py", "empty", EMOJI_BUNDLE, "-o", skeleton).returncode == 0
    assert does("weights", case=case)["weights"] == "random"
    does("build", case=case, components=["unet_step"])
    answer = does("step", case=case)
    assert answer["weights"] == "random"
    assert answer["device"] == "Fake GPU"


def test_sdopt_bench_says_what_to_build_and_measures_what_is_built(run: Run, tmp_path: Path) -> None:
    bundle = shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle")
    fields = {name: value for name, value in CASE.to_json().items() if name not in ("name", "backend")}
    cases = tmp_path / "cases.json"
    half = {**fields, "backend": "tensorrt"}
    cases.write_text(json.dumps({"half": half, "exact": {**half, "precision": "fp32"}}))
    words = ["-m", "sdopt", "bench", bundle, "--baseline", EMOJI_CHECKPOINT, "--baselines", "eager-fp32"]
    words += ["--cases", cases, "--device", "cpu", "--rounds", 2, "--threads", 1, "--json", tmp_path / "run.json"]
    missing = run(*words, "--case", "half", "--cold-rounds", 0)
    assert missing.returncode != 0
    assert f"sdopt build {bundle} --backend tensorrt" in missing.stderr
    built = run("-m", "sdopt", "build", bundle, "--backend", "tensorrt", "--static", "--profile", "height=64 width=64")
    assert built.returncode == 0, built.stderr
    other = run(*words, "--case", "exact", "--cold-rounds", 0)
    assert "--precision fp32" in other.stderr
    done = run(*words, "--case", "half", "--cold-rounds", 1, "--report", tmp_path / "run.md")
    assert done.returncode == 0, done.stderr
    ours, eager = read(tmp_path / "run.json")["results"][0]["sides"]
    assert ours["quotable"]
    assert {"step", "host_step", "loop_step"} & set(eager["seconds"]) == {"loop_step"}
    assert "others: UNet alone" in (tmp_path / "run.md").read_text()
    assert ours["precision"] == "fp16"
    assert "on Fake GPU" in ours["note"]
    assert {"step", "host_step", "picture", "cold_start"} <= set(ours["seconds"]), ours["note"]
    assert len(ours["parts"]["step.device"]) == 2


def test_a_few_gpu_tests_run_on_it(run: Run, tmp_path: Path) -> None:
    some = "static or inpainting_with_four or from_picture or one_graph_a_step or bit_for_bit"
    done = run("-m", "pytest", "-m", "gpu", "-q", "-k", some, "-p", "no:cacheprovider", f"--basetemp={tmp_path / 't'}")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
