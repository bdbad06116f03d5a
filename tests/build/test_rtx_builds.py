"""The record of full-size builds, on the emoji model: an entry for each build, written once."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EMOJI_BUNDLE, ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "sdopt[tensorrt-rtx]"',
)


def run(folder: Path, *more: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    command = [sys.executable, ROOT / "benchmarks/rtx_builds.py", "--cache", folder, "-o", folder / "record.json"]
    command += ["--models", "emoji", "--components", "vae_encoder", "--opt-level", "0", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # this checkout, whichever one is installed
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    return done, json.loads((folder / "record.json").read_text())["builds"]


def test_builds_are_recorded_once_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    shutil.copytree(EMOJI_BUNDLE, tmp_path / "emoji/bundle")
    done, builds = run(tmp_path, "--precisions", "bf16", "--shapes", "static")
    assert done.returncode == 0, done.stderr
    (first,) = builds
    assert (first["built"], first["profiles"]) == ("bf16", ["batch=1 height=128 width=128"])
    assert first["layers"]["BF16"] > 3 * first["layers"].get("FLOAT", 0)
    assert first["plan_bytes"] > first["weight_bytes"] > 1e6
    assert first["peak_rss_bytes"] > 1e8
    assert first["seconds"] > 0
    done, builds = run(tmp_path, "--precisions", "bf16")
    assert [b["shapes"] for b in builds] == ["static", "two profiles"]
    assert builds[0] == first
    assert len(builds[1]["profiles"]) == 2
    assert not list((tmp_path / "emoji/bundle/engines").glob("*/engine.plan"))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nosuch", "nosuch/bundle, and the models are sd15, sd21, sdxl"),
        ("sd15", "sd15/bundle is missing; make it: python benchmarks/models.py sd15 --cache"),
    ],
)
def test_a_model_that_is_not_there_is_refused_at_once(tmp_path: Path, model: str, told: str) -> None:
    command = [sys.executable, ROOT / "benchmarks/rtx_builds.py", "--cache", tmp_path, "--models", model]
    done = subprocess.run([*command, "-o", tmp_path / "record.json"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, told in done.stderr) == (2, True)
    assert not (tmp_path / "record.json").exists()


def test_a_build_that_fails_or_takes_too_long_is_an_entry(tmp_path: Path) -> None:
    shutil.copytree(EMOJI_BUNDLE, tmp_path / "emoji/bundle")
    done, builds = run(tmp_path, "--precisions", "fp16", "--shapes", "static", "--limit", "0.1")
    assert done.returncode == 1
    assert builds[0]["error"] == "took longer than 0 s"
    done, builds = run(tmp_path, "--precisions", "fp8", "--shapes", "static")
    assert "precision 'fp8'; allowed are" in builds[1]["error"]
